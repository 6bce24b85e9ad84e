#!/usr/bin/env bash
# Trains on this machine, on whatever devices JAX finds (CPU included). The same command continues a
# stopped run.
#   launch/local.sh --config=experiments/shapes.py --workdir=runs/shapes \
#     [--config.KEY=VALUE ...] [--dry-run]
# Relative paths are those of the folder that it is called in. PYTHON picks the interpreter.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

arguments=() dry=
for argument in "$@"; do
  # experiments/NAME.py is the checkout's, from any folder that has none of that name
  file=${argument#--config=}
  [[ $argument == --config=* && ! -e ${file%%:*} && -f $root/${file%%:*} ]] &&
    argument=--config=$root/$file
  [[ $argument == --dry-run ]] && dry=yes || arguments+=("$argument")
done
if ((${#arguments[@]} == 0)); then
  usage="--config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...] [--dry-run]"
  echo "usage: launch/local.sh $usage" >&2
  exit 2
fi

environment=(
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # the package of this checkout
  TF_CPP_MIN_LOG_LEVEL=1 # XLA's notes are no news
)
command=(env "${environment[@]}" "${PYTHON:-python}" -m hiar_jax.train "${arguments[@]}")

if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
