#!/usr/bin/env bash
# Trains and measures the packed runs of docs/long_videos.md, side by side on one GPU (or one after
# another with JOBS=1, on a CPU: hours). What is finished is not done again.
#   launch/long_videos.sh [--dry-run] [RUN ...]     runs: framepack, both_ends, inverted, discrete,
#     screen, screen_window, screen_long, hiar_packed, hiar_ring (its control: a window alone)
# PYTHON picks the interpreter, JOBS=1 runs one at a time, OUT is where rows go.
set -euo pipefail
cd "$(dirname "$0")/.."

# run -> config, the run whose data and teacher it takes, the table, what it changes; a video of
# table "long" has 360 frames, which are eight clips or, of the shorter ones of HiAR, 24
declare -A config=(
  [framepack]=shapes_framepack.py [both_ends]=shapes_framepack_both_ends.py
  [inverted]=shapes_framepack_inverted.py [discrete]=shapes_framepack_discrete.py
  [screen]=shapes_screen.py [screen_window]=shapes_screen.py:window [screen_long]=shapes_screen.py:long
  [hiar_packed]=shapes_hiar_packed.py [hiar_ring]=shapes_hiar_packed.py
)
declare -A from=(
  [both_ends]=framepack [discrete]=framepack [screen_window]=screen [screen_long]=screen
  [hiar_ring]=hiar_packed
)
declare -A rows=([screen]=screen [screen_window]=screen [screen_long]=screen)
declare -A lengths=([hiar_packed]=24 [hiar_ring]=24 [screen]=1 [screen_window]=1 [screen_long]=1)
declare -A changes=([hiar_ring]="--config.history.past=ring --config.history.packing=")

python=${PYTHON:-python} out=${OUT:-docs/rows} dry=
[[ ${1:-} == --dry-run ]] && dry=yes && shift
runs=("$@")
((${#runs[@]})) || runs=(
  framepack screen hiar_packed inverted both_ends discrete screen_window screen_long hiar_ring
)
for run in "${runs[@]}"; do
  if [[ -z ${config[$run]:-} ]]; then
    echo "launch/long_videos.sh: no run $run; there are ${!config[*]}" >&2
    exit 2
  fi
done

# small programs: autotuning takes longer than it saves, and layers that are not unrolled compile in
# a third of the time
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# runs of one shape share their programs
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/programs}
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"

run_one() {
  local run=$1 table=${rows[$1]:-long} length=${lengths[$1]:-8} base=${from[$1]:-}
  # no previews, and few samples: what is measured is made by the second command
  local train=("$python" -m hiar_jax.train "--config=experiments/${config[$run]}"
    "--workdir=runs/$run" --config.model.unroll=1 --config.log.preview_every=1000000
    --config.sample.length=1 --config.sample.measure=27)
  [[ $base ]] && train+=("--config.stages_from=runs/$base")
  train+=(${changes[$run]:-})
  local measure=("$python" -m hiar_jax.evaluate "--workdirs=runs/$run" "--length=$length"
    "--rows=$out/$table" "--out=runs/$run/$table")
  # true clips, the codec and the teacher are rows too: shapes.py's in "long", screen's in "screen"
  [[ $run == screen ]] || measure+=(--baselines=)
  if [[ $dry ]]; then
    echo "${train[*]}"
    echo "${measure[*]}"
    return
  fi
  # what it takes is whole: the base's own stage has begun
  until [[ -z $base || -d runs/$base/framepack || -d runs/$base/causal_init ]]; do sleep 2; done
  "${train[@]}" && "${measure[@]}"
}

status=0
for run in "${runs[@]}"; do
  if [[ $dry || ${JOBS:-} == 1 ]]; then
    run_one "$run"
  else
    mkdir -p runs
    run_one "$run" >"runs/$run.log" 2>&1 &
  fi
done
for job in $(jobs -p); do wait "$job" || status=1; done
exit $status
