#!/usr/bin/env bash
# Trains on every host of a Cloud TPU slice. The same command continues a stopped run.
#   TPU_NAME=my-pod ZONE=us-central2-b launch/tpu_pod.sh \
#     --config=experiments/hiar_wan_1_3b.py --workdir=/mnt/bucket/runs/hiar
#   ... --dry-run prints the command and runs nothing.
# Also read: PROJECT (gcloud's default), DIRECTORY (the checkout on each host, ~/hiar_jax), PYTHON
# (python3 there). Each host needs the checkout and: pip install 'hiar_jax[tpu]'. Every host sees the
# workdir under one path: a network disk, or a bucket mounted there (gcsfuse BUCKET /mnt/bucket).
set -euo pipefail

arguments=() dry=
for argument in "$@"; do
  [[ $argument == --dry-run ]] && dry=yes || arguments+=("$argument")
done
if ((${#arguments[@]} == 0)) || [[ -z ${TPU_NAME:-} || -z ${ZONE:-} ]]; then
  usage="--config=FILE[:VARIANT] --workdir=DIR [--config.KEY=VALUE ...] [--dry-run]"
  echo "usage: TPU_NAME=NAME ZONE=ZONE launch/tpu_pod.sh $usage" >&2
  exit 2
fi

environment=(
  # every host calls jax.distributed.initialize(), which asks the TPU's own metadata for the rest
  HIAR_DISTRIBUTED=1
  JAX_PLATFORMS="tpu,cpu"
  TF_CPP_MIN_LOG_LEVEL=1
)
# Quoted twice: for this shell's call of gcloud, and for the shell that runs it on each host.
train=(env "${environment[@]}" "${PYTHON:-python3}" -m hiar_jax.train "${arguments[@]}")
# A leading ~ is left to the host's shell.
directory=${DIRECTORY:-'~/hiar_jax'} home=
[[ $directory == '~/'* ]] && home='~/' directory=${directory#'~/'}
remote="cd $home$(printf %q "$directory") && $(printf '%q ' "${train[@]}")"
command=(
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
  --worker=all "--command=$remote"
)

if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
