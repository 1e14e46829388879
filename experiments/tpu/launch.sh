#!/usr/bin/env bash
# A run on a Cloud TPU slice, from its creation to its deletion. docs/tpu.md explains it.
# Untested on a chip.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: PROJECT=... BUCKET=... experiments/tpu/launch.sh [--dry-run] COMMAND [options]

  create            ask for the slice, and return; it costs money from when it is ACTIVE
  install           copy this checkout's last commit to every host, and install it
  start [options]   start the run on every host, or continue it
  status            the slice, the run on every host, and the end of its log
  stop              save a checkpoint at a common step, and end the run
  keep [options]    all of it: create, install, start; again after every preemption and
                    failure, until the run has finished; then delete the slice
  fetch             copy the run's folder from the bucket to runs/NAME
  delete            delete the slice; the bucket stays

  --dry-run         print the commands instead of executing them
  [options]         of the recipe, such as --batch-size 2048 --fsdp 4

Variables, with their defaults:
  PROJECT, BUCKET   the Google Cloud project, and a bucket without gs:// (no default)
  ZONE              europe-west4-b
  TPU               jemjax: the name of the slice
  ACCELERATOR       v5litepod-16: its kind and number of chips
  RUNTIME           v2-alpha-tpuv5-lite: its software, which belongs to the kind
  SPOT              yes: cheap and preemptible; no: on demand
  RECIPE            experiments/imagenet.py, or a method for `jemjax pretrain`
  DATA              tfds:imagenet2012, prepared in the bucket's folder datasets
  NAME              imagenet: the run's folder in the bucket's folder runs
  ATTEMPTS          20: how often `keep` installs or starts on one slice
EOF
}

execute() {
  if [[ $dry_run == yes ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpus() {
  execute gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet
}

# on_hosts WORKERS WORD...: runs worker.sh with these words on a host, or on all.
on_hosts() {
  local workers=$1
  shift
  tpus tpu-vm ssh "$TPU" --worker="$workers" \
    --command="bash checkout/experiments/tpu/worker.sh $(printf '%q ' "$@")"
}

create() {
  local request=(queued-resources create "$TPU" --node-id="$TPU"
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  if [[ $SPOT == yes ]]; then
    request+=(--spot)
  fi
  tpus "${request[@]}" --async
}

install() {
  local archive="${TMPDIR:-/tmp}/jemjax.tar.gz"
  execute git archive --format=tar.gz --output="$archive" HEAD
  tpus tpu-vm scp "$archive" "$TPU:jemjax.tar.gz" --worker=all
  tpus tpu-vm ssh "$TPU" --worker=all \
    --command="mkdir -p checkout && tar -xzf jemjax.tar.gz -C checkout"
  on_hosts all install
}

# Every host runs the same command; paths are relative to its home folder.
start() {
  local program=(jemjax pretrain "$RECIPE")
  if [[ $RECIPE == *.py ]]; then
    program=(python "checkout/$RECIPE")
  fi
  on_hosts all start "$BUCKET" "${program[@]}" \
    --data "$DATA" --data-dir bucket/datasets --output "bucket/runs/$NAME" \
    --multihost --resume "$@"
}

status() {
  tpus queued-resources describe "$TPU" --format="value(state.state)"
  on_hosts all status
  on_hosts 0 log
}

delete() {
  tpus queued-resources delete "$TPU" --force
}

# Of the slice: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...; nothing if there is none;
# unknown if Google cannot be asked now.
state() {
  local errors
  errors=$(mktemp)
  tpus queued-resources describe "$TPU" --format="value(state.state)" 2>"$errors" ||
    grep -q NOT_FOUND "$errors" || echo unknown
  rm "$errors"
}

# Of the run, a line for each host: absent, running or stopped.
progress() {
  tpus tpu-vm ssh "$TPU" --worker=all \
    --command="bash checkout/experiments/tpu/worker.sh status || echo absent" \
    2>/dev/null || true
}

finished() {
  gcloud storage ls "gs://$BUCKET/runs/$NAME/results.json" >/dev/null 2>&1
}

keep() {
  if [[ $dry_run == yes ]]; then
    create
    install
    start "$@"
    delete
    return
  fi
  local attempts=0
  until finished; do
    case $(state) in
    "")
      if "$self" create; then attempts=0; else attempt false; fi
      ;;
    FAILED | SUSPENDING | SUSPENDED) delete || true ;; # it cannot become active again
    ACTIVE)
      case $(progress) in
      *running*) ;; # on all hosts, or about to end: one without the others cannot go on
      *absent*) attempt "$self" install && attempt "$self" start "$@" ;;
      *stopped*) attempt "$self" start "$@" ;;
      esac
      ;;
    esac
    sleep 60
  done
  delete
}

# Each is a process of its own, in which the first failure is the end.
attempt() {
  if ((++attempts > ATTEMPTS)); then
    on_hosts 0 log >&2 || true
    echo "launch.sh: $ATTEMPTS attempts on this slice, which still costs: delete it" >&2
    exit 1
  fi
  "$@" || true
}

dry_run=no
if [[ ${1:-} == --dry-run ]]; then
  dry_run=yes
  shift
fi
command=${1:-help}
case $command in
create | install | start | status | stop | keep | fetch | delete) shift ;;
help | -h | --help)
  usage
  exit
  ;;
*)
  usage >&2
  exit 2
  ;;
esac
if [[ -z ${PROJECT:-} || -z ${BUCKET:-} ]]; then
  echo "launch.sh: PROJECT and BUCKET: not set, expected both; see --help" >&2
  exit 2
fi
: "${ZONE:=europe-west4-b}" "${TPU:=jemjax}" "${ACCELERATOR:=v5litepod-16}"
: "${RUNTIME:=v2-alpha-tpuv5-lite}" "${SPOT:=yes}" "${RECIPE:=experiments/imagenet.py}"
: "${DATA:=tfds:imagenet2012}" "${NAME:=imagenet}" "${ATTEMPTS:=20}"
export PROJECT BUCKET ZONE TPU ACCELERATOR RUNTIME SPOT RECIPE DATA NAME
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
self=experiments/tpu/launch.sh

case $command in
stop) on_hosts all stop ;;
fetch) execute gcloud storage rsync --recursive "gs://$BUCKET/runs/$NAME" "runs/$NAME" ;;
*) "$command" "$@" ;;
esac
