#!/usr/bin/env bash
# Trains on a Cloud TPU slice that it asks for, and gives back: queued resource, installation, run on all workers, resume after
# a preemption, deletion.
#
#   ./scripts/tpu_pod.sh [--dry-run] [--keep] [--spot] NAME ZONE ACCELERATOR RUNTIME TRAIN_OPTION...
#   ./scripts/tpu_pod.sh --spot sst2 us-central1-a v5litepod-16 v2-alpha-tpuv5-lite \
#       --config configs/sst2.py --workdir gs://my-bucket/runs/sst2
#
# --dry-run prints every command and runs none; --keep leaves the TPU when the run has ended or failed; --spot takes one that
# may be taken back: then a new one is asked for, and the same command goes on with the run.
#
# WORKDIR is what all workers share and what outlives them: gs://BUCKET/FOLDER, or an NFS (Filestore) mount. SETUP='...' is run on
# every worker first, to mount it. The committed code of this repository is what is copied. Needs gcloud, logged in, with a project.
# Not run here: this was written without access to Cloud TPU.
set -euo pipefail

usage() { sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

dry_run=false keep=false spot=()
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --keep) keep=true ;;
        --spot) spot=(--spot) ;;
        *) usage ;;
    esac
    shift
done
[[ $# -ge 5 ]] || usage
name=$1 zone=$2 accelerator=$3 runtime=$4
shift 4
[[ " $* " == *" --workdir "* ]] || { echo "tpu_pod.sh: --workdir FOLDER is missing" >&2; exit 2; }

archive=finetune_jax.tar.gz
place=(--zone "$zone")
root=$(dirname "${BASH_SOURCE[0]}")/..

run() {
    if $dry_run; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

on_all() {  # a command line, on every worker at once, its output streamed here
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --batch-size=all --command "$1"
}

state() {
    gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2> /dev/null || echo MISSING
}

create() {
    run gcloud compute tpus queued-resources create "$name" --node-id "$name" "${place[@]}" \
        --accelerator-type "$accelerator" --runtime-version "$runtime" "${spot[@]}"
    if $dry_run; then return; fi
    local now
    until now=$(state); [[ $now == ACTIVE ]]; do
        [[ $now != FAILED && $now != MISSING ]] || { echo "tpu_pod.sh: the request for $name is $now" >&2; exit 1; }
        echo "$name: $now"
        sleep 30
    done
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

install() {
    run git -C "$root" archive --format=tar.gz --prefix=finetune_jax/ --output "$PWD/$archive" HEAD
    run gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all
    if [[ -n ${SETUP:-} ]]; then on_all "$SETUP"; fi
    # The images' own Python is older than 3.11.
    on_all "set -e; tar -xzf $archive; python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --python 3.11 venv; \
~/.local/bin/uv pip install --quiet --python venv/bin/python './finetune_jax[tpu,gcs]'"
}

train=$(printf ' %q' "$@")
code=0
if ! $dry_run && ! $keep; then trap delete EXIT; fi
while true; do
    create
    install
    code=0
    on_all "cd finetune_jax && ../venv/bin/python -m finetune_jax train$train" || code=$?
    if $dry_run; then
        if ! $keep; then delete; fi
        exit 0
    fi
    if ((code == 0)) || [[ $(state) == ACTIVE || -z ${spot[*]} ]]; then exit "$code"; fi
    echo "$name was taken back; a new one is asked for, and the run goes on" >&2
    delete || true
done
