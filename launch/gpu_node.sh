#!/usr/bin/env bash
# Trains on all GPUs of this node; under Slurm (srun, one task a node) on all nodes of the job. The
# same command continues.
#   launch/gpu_node.sh --config=experiments/hiar_wan_1_3b.py --workdir=/shared/runs/hiar \
#     [--config.KEY=VALUE ...] [--dry-run]
#   srun --nodes=4 --ntasks-per-node=1 launch/gpu_node.sh ...
# Relative paths are those of the folder that it is called in. PYTHON picks the interpreter. Needs:
# pip install 'hiar_jax[cuda]', and a workdir that every node sees.
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
  echo "usage: launch/gpu_node.sh $usage" >&2
  exit 2
fi

environment=(
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # the package of this checkout
  JAX_PLATFORMS=cuda # fail where no GPU is found, instead of training on the CPU
  TF_CPP_MIN_LOG_LEVEL=1
  # the rest is NCCL's and the video decoder's
  XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
  # FSDP's gathers overlap with compute
  XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
)
if ((${SLURM_NTASKS:-1} > 1)); then
  environment+=(HIAR_DISTRIBUTED=1) # jax.distributed.initialize() reads the rest from Slurm
fi
command=(env "${environment[@]}" "${PYTHON:-python}" -m hiar_jax.train "${arguments[@]}")

if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
