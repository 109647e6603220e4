#!/usr/bin/env bash
# Trains with several processes on this machine, as several hosts would: to try a recipe before it goes to a cluster.
#
#   ./scripts/multihost_local.sh [--dry-run] PROCESSES DEVICES_EACH TRAIN_OPTION...
#   ./scripts/multihost_local.sh 2 2 --config configs/digits_resnet.py --workdir runs/digits
#
# Each process has DEVICES_EACH CPU devices. Process 0 writes to the terminal, process N to WORKDIR.process-N.log beside the run
# (here, of a run in a bucket).
# Ctrl-C and SIGTERM reach all of them: they save at one step and stop. If one fails, the others end too, and the first exit code
# that is not 0 is this script's.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

dry_run=false
if [[ ${1:-} == --dry-run ]]; then dry_run=true; shift; fi
[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ && $2 =~ ^[1-9][0-9]*$ ]] || usage
processes=$1 devices=$2
shift 2

workdir=
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --workdir ]]; then next=$((i + 1)); workdir=${!next}; fi
done
[[ -n $workdir ]] || { echo "multihost_local.sh: --workdir FOLDER is missing" >&2; exit 2; }

beside=$workdir
if [[ $workdir == *://* ]]; then beside=$(basename "$workdir"); fi

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices

children=()
for ((process = 0; process < processes; process++)); do
    command=(python3 -m finetune_jax train "$@" --distributed.coordinator "127.0.0.1:$port"
             --distributed.processes "$processes" --distributed.process "$process")
    log=$beside.process-$process.log
    if $dry_run; then
        printf 'JAX_PLATFORMS=%s JAX_NUM_CPU_DEVICES=%s' "$JAX_PLATFORMS" "$JAX_NUM_CPU_DEVICES"
        printf ' %q' "${command[@]}"
        if ((process)); then printf ' > %q 2>&1' "$log"; fi
        printf ' &\n'
    elif ((process)); then
        mkdir -p "$(dirname "$beside")"
        "${command[@]}" > "$log" 2>&1 &
        children+=($!)
    else
        "${command[@]}" &
        children+=($!)
    fi
done
if $dry_run; then exit 0; fi

trap 'kill -TERM "${children[@]}" 2> /dev/null || true' TERM
trap 'kill -INT "${children[@]}" 2> /dev/null || true' INT

result=0
for child in "${children[@]}"; do
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2> /dev/null || break  # a signal of ours ended the wait, not the child
    done
    if ((code != 0 && result == 0)); then result=$code; fi
done
exit "$result"
