#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster: image, JobSet controller, node pools, run, logs, deletion.
#
#   ./scripts/gke_tpu.sh [--dry-run] [--keep] [--spot] [--slices N] NAME CLUSTER LOCATION KIND:TOPOLOGY IMAGE TRAIN_OPTION...
#   ./scripts/gke_tpu.sh --spot --slices 2 sst2 my-cluster us-central1 v5e:4x4 us-docker.pkg.dev/my-project/my-repo/finetune_jax \
#       --config configs/sst2.py --workdir gs://my-bucket/runs/sst2
#
# --dry-run prints every command, the filled-in scripts/gke_jobset.yaml too, and runs none; --keep leaves JobSet and node pools when
# the run has ended or failed; --spot takes nodes that may be taken back: all Pods start again then, and go on with the run, at most
# RESTARTS=100 times. KIND is v4, v5e, v5p or v6e.
#
# The committed code of this repository is what the image holds. WORKDIR is on gs://: a Pod's disk goes with it. The Pods run as the
# Kubernetes service account SERVICE_ACCOUNT=default, which must be allowed to write there. Needs gcloud, logged in, docker, kubectl,
# and a cluster. Not run here: this was written without access to GKE.
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
refuse() { echo "gke_tpu.sh: $1" >&2; exit 2; }

dry_run=false keep=false spot=() slices=1
while [[ ${1:-} == --* ]]; do
    case $1 in
        --dry-run) dry_run=true ;;
        --keep) keep=true ;;
        --spot) spot=(--spot) ;;
        --slices) slices=${2:-}; shift ;;
        *) usage ;;
    esac
    shift
done
[[ $# -ge 6 && $slices =~ ^[1-9][0-9]*$ ]] || usage
name=$1 cluster=$2 location=$3 target=$4 image=$5
shift 5
[[ $name =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] || refuse "NAME $name is not of lower-case letters, digits and -, 32 at most"
workdir=
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --workdir ]]; then next=$((i + 1)); workdir=${!next}; fi
done
[[ $workdir == gs://* ]] || refuse "--workdir ${workdir:-FOLDER} is not on gs://; a Pod's disk goes with the Pod"

kind=${target%%:*} topology=${target#*:}
case $kind in
    v4) accelerator=tpu-v4-podslice machine=ct4p-hightpu ;;
    v5e) accelerator=tpu-v5-lite-podslice machine=ct5lp-hightpu ;;
    v5p) accelerator=tpu-v5p-slice machine=ct5p-hightpu ;;
    v6e) accelerator=tpu-v6e-slice machine=ct6e-standard ;;
    *) refuse "there is no TPU $kind on GKE, only v4, v5e, v5p and v6e" ;;
esac
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || refuse "$target is not KIND:TOPOLOGY, such as v5e:4x4 or v5p:2x2x2"
all=$((${topology//x/*}))
# Hosts of a larger slice have four chips each; eight chips of v5e and v6e are one host.
chips=4
if ((all < 4)) || [[ $all == 8 && $kind == v[56]e ]]; then chips=$all; fi
hosts=$((all / chips))

place=(--location "$location")
root=$(dirname "${BASH_SOURCE[0]}")/..

run() {
    if $dry_run; then printf '%q ' "$@"; printf '\n'; else "$@"; fi
}

manifest() {
    local text arguments
    text=$(< "$root/scripts/gke_jobset.yaml")
    arguments=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' train "$@")
    text=${text//@NAME@/"$name"}
    text=${text//@RESTARTS@/"${RESTARTS:-100}"}
    text=${text//@SLICES@/"$slices"}
    text=${text//@HOSTS@/"$hosts"}
    text=${text//@CHIPS@/"$chips"}
    text=${text//@SERVICE_ACCOUNT@/"${SERVICE_ACCOUNT:-default}"}
    text=${text//@ACCELERATOR@/"$accelerator"}
    text=${text//@TOPOLOGY@/"$topology"}
    text=${text//@IMAGE@/"$image"}
    printf '%s\n' "${text//@ARGUMENTS@/"$arguments"}"
}

build() {
    if $dry_run; then
        printf 'git -C %q archive HEAD | docker build --file scripts/Dockerfile --tag %q -\n' "$root" "$image"
    else
        git -C "$root" archive HEAD | docker build --file scripts/Dockerfile --tag "$image" -
    fi
    run docker push "$image"
}

create() {
    local slice
    for ((slice = 0; slice < slices; slice++)); do
        run gcloud container node-pools create "$name-$slice" --cluster "$cluster" "${place[@]}" \
            --machine-type "$machine-${chips}t" --tpu-topology "$topology" --num-nodes "$hosts" "${spot[@]}"
    done
}

delete() {
    local slice
    run kubectl delete jobset "$name" --ignore-not-found
    for ((slice = 0; slice < slices; slice++)); do
        run gcloud container node-pools delete "$name-$slice" --cluster "$cluster" "${place[@]}" --quiet
    done
}

ended() { kubectl get jobset "$name" --output 'jsonpath={.status.terminalState}'; }

build
run gcloud container clusters get-credentials "$cluster" "${place[@]}"
run kubectl apply --server-side --filename https://github.com/kubernetes-sigs/jobset/releases/download/v0.8.0/manifests.yaml
run kubectl wait --namespace jobset-system --for condition=Available --timeout 300s deployment/jobset-controller-manager
if ! $dry_run && ! $keep; then trap 'delete || true' EXIT; fi
create
logs=(kubectl logs --follow --pod-running-timeout 30m --selector
      "jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0")
if $dry_run; then
    printf "kubectl apply --filename - <<'EOF'\n%s\nEOF\n" "$(manifest "$@")"
    run "${logs[@]}"
    if ! $keep; then delete; fi
    exit 0
fi
manifest "$@" | kubectl apply --filename -
# The log of a Pod ends with the Pod; that of the one which takes its place is a new one.
while state=$(ended); [[ -z $state ]]; do
    "${logs[@]}" || true
    sleep 10
done
echo "$name: $state" >&2
[[ $state == Completed ]]
