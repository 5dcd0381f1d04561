#!/usr/bin/env bash
# A TPU slice from request to training, started again when it is preempted:
#
#   NAME=cola ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#     launch/tpu_pod.sh --config=configs/paper_2b.py --workdir=/mnt/shared/run
#
# The arguments are those of launch/train.py. Every worker runs the same program, which finds the others by itself.
# Before each start this folder is copied to every worker, so that edited code is used, and what is left of an earlier
# training is stopped. --workdir is on storage that every worker mounts and that outlives the slice. More variables:
#
#   MOUNTS='host:/volume=/mnt/shared gs://bucket=/mnt/bucket'   NFS and gcsfuse mounts to make on every worker
#   SETUP='sudo apt-get install -y nfs-common'                  a command for every worker, before all else
#   SPOT=1                  preemptible capacity         RESTARTS=100   starts, after which it is given up
#   REFUSALS=5              requests or installations in a row that may fail
#   LIBTPU=0.0.52           instead of the one in launch/constraints.txt
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?its zone}" "${TYPE:?for example v5litepod-16}" "${RUNTIME:?TPU software version}"
cd "$(dirname "$0")/.."
request="$NAME-request" most=${REFUSALS:-5}

say() { echo "$(date +%T) $*"; }

# ACTIVE, another state of the request, NONE if there is no such request, UNKNOWN if the cloud did not answer.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$request" --zone="$ZONE" \
    --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ "$answer" == *NOT_FOUND* || "$answer" == *"not found"* ]]; then
    echo NONE
  else
    echo UNKNOWN
  fi
}

remove() {
  gcloud compute tpus queued-resources delete "$request" --zone="$ZONE" --force --quiet || true
}

# Waits for the slice, asks for one where there is none. Status 1: the request was refused, 2: it came to nothing.
ensure() {
  local now silent=0
  while :; do
    now=$(state)
    case "$now" in
      ACTIVE) return 0 ;;
      NONE)
        gcloud compute tpus queued-resources create "$request" --node-id="$NAME" --zone="$ZONE" \
          --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot} || return 1
        ;;
      FAILED | SUSPENDED | SUSPENDING)
        say "the slice is $now"
        remove
        return 2
        ;;
      UNKNOWN) # not a reason to delete what may be training
        silent=$((silent + 1))
        if [ "$silent" -ge 20 ]; then return 2; fi
        ;;
      *) say "waiting for $TYPE: $now" ;;
    esac
    if [ "$now" != NONE ]; then sleep 30; fi
  done
}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

# The code of now on every worker, in the place of what was sent before; runs/ stays. Then what launch/tpu_worker.sh does.
deploy() {
  local folder status=0
  folder=$(mktemp -d)
  { tar czf "$folder/cola_jax.tgz" --exclude={./runs,./.venv,./.git,__pycache__,.pytest_cache,.ruff_cache} . ||
    [ $? = 1 ]; } && # 1: a file changed meanwhile
    gcloud compute tpus tpu-vm scp "$folder/cola_jax.tgz" "$NAME": --zone="$ZONE" --worker=all &&
    everywhere 'mkdir -p cola_jax && cd cola_jax && rm -rf cola_jax configs launch &&
      tar xzf ../cola_jax.tgz && '"bash launch/tpu_worker.sh $(printf '%q ' "${SETUP:-}" "${MOUNTS:-}" "${LIBTPU:-}")" ||
    status=$?
  rm -rf "$folder"
  return "$status"
}

# Pauses after a failure; fails itself when there were too many in a row.
try_again() {
  failed=$((failed + 1))
  say "$1 failed, $failed of $most in a row"
  if [ "$failed" -ge "$most" ]; then
    echo "error: $1 failed $failed times: see above" >&2
    return 1
  fi
  sleep $((30 * failed))
}

arguments=$(printf '%q ' "$@")
status=1 failed=0 pause=10
for start in $(seq "${RESTARTS:-100}"); do
  found=0
  ensure || found=$?
  case "$found" in
    1) try_again "the request for $TYPE" || exit 1; continue ;;
    2) sleep 30; continue ;;
  esac
  deploy || { try_again "the installation on $NAME" || exit 1; continue; }
  failed=0 status=0 began=$SECONDS
  everywhere "cd cola_jax && exec .venv/bin/python launch/train.py $arguments" || status=$?
  # Done, or something that a new start will not mend: a wrong flag (2), a loss that is not finite (3).
  case "$status" in 0 | 2 | 3) exit "$status" ;; esac
  # What fails at once fails again at once, while a disk is full, say.
  if [ $((SECONDS - began)) -lt 120 ]; then pause=$((pause < 300 ? 2 * pause : 600)); else pause=10; fi
  say "training ended with status $status: start $start is over, the next one in $pause s"
  sleep "$pause"
done
echo "error: given up after ${RESTARTS:-100} starts" >&2
exit "$status"
