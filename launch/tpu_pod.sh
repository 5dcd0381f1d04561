#!/usr/bin/env bash
# A TPU slice from request to training, started again when it is preempted:
#
#   NAME=cola ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     launch/tpu_pod.sh --config=configs/paper_2b.py --workdir=/mnt/shared/run
#
# The arguments are those of launch/train.py; --workdir is on storage that every worker mounts and that outlives the
# slice (Filestore, gcsfuse). Every worker runs the same program, which finds the others by itself. SPOT=1 asks for
# preemptible capacity; after RESTARTS (100) starts it is given up.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?its zone}" "${TYPE:?for example v5litepod-16}" "${RUNTIME:?TPU software version}"
cd "$(dirname "$0")/.."
request="$NAME-request"

state() {
  gcloud compute tpus queued-resources describe "$request" --zone="$ZONE" --format='value(state.state)' 2>/dev/null || true
}

remove() {
  gcloud compute tpus queued-resources delete "$request" --zone="$ZONE" --force --quiet || true
}

create() {
  gcloud compute tpus queued-resources create "$request" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in FAILED | SUSPENDED | SUSPENDING) return 1 ;; esac
    echo "$(date +%T) waiting for $TYPE: $(state)"
    sleep 30
  done
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

install() {
  local archive
  archive=$(mktemp -d)/cola_jax.tgz
  tar czf "$archive" --exclude=runs --exclude=.venv --exclude=.git .
  gcloud compute tpus tpu-vm scp "$archive" "$NAME": --zone="$ZONE" --worker=all
  everywhere 'mkdir -p cola_jax && tar xzf cola_jax.tgz -C cola_jax && cd cola_jax &&
    python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
}

arguments=$(printf '%q ' "$@")
for start in $(seq "${RESTARTS:-100}"); do
  if [ "$(state)" != ACTIVE ]; then
    remove
    create && install || continue
  fi
  status=0
  everywhere "cd cola_jax && exec .venv/bin/python launch/train.py $arguments" || status=$?
  # Done, or something that a new start will not mend: a wrong flag (2), a loss that is not finite (3).
  case "$status" in 0 | 2 | 3) exit "$status" ;; esac
  echo "$(date +%T) training ended with status $status, slice is $(state): start $start is over"
  sleep 10
done
exit "${status:-1}"
