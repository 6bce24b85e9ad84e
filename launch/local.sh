#!/usr/bin/env bash
# Trains on this machine, on whatever devices JAX finds (CPU included). The same command continues a
# stopped run.
#   launch/local.sh --config=experiments/shapes.py --workdir=runs/shapes \
#     [--config.KEY=VALUE ...] [--dry-run]
# PYTHON picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

arguments=() dry=
for argument in "$@"; do
  [[ $argument == --dry-run ]] && dry=yes || arguments+=("$argument")
done
if ((${#arguments[@]} == 0)); then
  usage="--config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...] [--dry-run]"
  echo "usage: launch/local.sh $usage" >&2
  exit 2
fi

environment=(
  TF_CPP_MIN_LOG_LEVEL=1 # XLA's notes are no news
)
command=(env "${environment[@]}" "${PYTHON:-python}" -m hiar_jax.train "${arguments[@]}")

if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
