#!/usr/bin/env bash
# Trains and measures the packed runs of docs/long_videos.md, side by side on one GPU (or one after
# another with JOBS=1, on a CPU: hours). What is finished is not done again.
#   launch/long_videos.sh [--dry-run] [RUN ...]     runs: framepack, both_ends, inverted, discrete,
#                                                   screen, screen_window, screen_long
# PYTHON picks the interpreter, JOBS how many run at once (default: all), OUT where rows go.
set -euo pipefail
cd "$(dirname "$0")/.."

# run -> config, the run whose data and teacher it takes, training lengths that are measured
declare -A config=(
  [framepack]=shapes_framepack.py [both_ends]=shapes_framepack_both_ends.py
  [inverted]=shapes_framepack_inverted.py [discrete]=shapes_framepack_discrete.py
  [screen]=shapes_screen.py [screen_window]=shapes_screen.py:window [screen_long]=shapes_screen.py:long
)
declare -A from=([both_ends]=framepack [discrete]=framepack [screen_window]=screen [screen_long]=screen)
declare -A rows=([screen]=screen [screen_window]=screen [screen_long]=screen)

python=${PYTHON:-python} out=${OUT:-docs/rows} dry=
[[ ${1:-} == --dry-run ]] && dry=yes && shift
runs=("$@")
((${#runs[@]})) || runs=(framepack screen both_ends inverted discrete screen_window screen_long)
for run in "${runs[@]}"; do
  if [[ -z ${config[$run]:-} ]]; then
    echo "launch/long_videos.sh: no run $run; there are ${!config[*]}" >&2
    exit 2
  fi
done

# small programs: autotuning takes longer than it saves, and layers that are not unrolled compile in
# a third of the time
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"

run_one() {
  local run=$1 table=${rows[$1]:-long} length=8 base=${from[$1]:-}
  [[ $table == screen ]] && length=1
  local train=("$python" -m hiar_jax.train "--config=experiments/${config[$run]}"
    "--workdir=runs/$run" --config.model.unroll=1)
  [[ $base ]] && train+=("--config.stages_from=runs/$base")
  local measure=("$python" -m hiar_jax.evaluate "--workdirs=runs/$run" "--length=$length"
    "--rows=$out/$table" "--out=runs/$run/$table")
  # true clips and the codec are rows too, once for each table
  [[ $run == framepack || $run == screen ]] || measure+=(--nobaselines)
  if [[ $dry ]]; then
    echo "${train[*]}"
    echo "${measure[*]}"
    return
  fi
  # its teacher's last checkpoint: the base's next stage has begun
  until [[ -z $base || -d runs/$base/framepack ]]; do sleep 2; done
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
