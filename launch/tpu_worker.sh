#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each worker before a start: launch/tpu_worker.sh SETUP MOUNTS LIBTPU (each may be empty)
#
# Runs SETUP, stops what is left of an earlier training, makes MOUNTS, and installs into .venv what is not there yet.
set -euo pipefail
cd "$(dirname "$0")/.."
setup=${1:-} mounts=${2:-} libtpu=${3:-}
fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

if [ -n "$setup" ]; then bash -c "$setup" || fail "SETUP = $setup: failed"; fi

# A connection that broke leaves training running; SIGTERM lets it save, which takes a step and a checkpoint.
training='python.* launch/train[.]py'
if pkill -TERM -f "$training"; then
  for _ in $(seq 180); do
    pgrep -f "$training" >/dev/null || break
    sleep 1
  done
  pkill -KILL -f "$training" || true
fi
rm -f /tmp/libtpu_lockfile 2>/dev/null || sudo -n rm -f /tmp/libtpu_lockfile || true

for mount in $mounts; do
  source=${mount%%=*} place=${mount#*=}
  if [ "$source" = "$mount" ] || [ "${place#/}" = "$place" ]; then fail "MOUNTS = $mount: must be SOURCE=/folder"; fi
  if mountpoint -q "$place"; then continue; fi
  sudo mkdir -p "$place"
  case "$source" in
    gs://*)
      command -v gcsfuse >/dev/null || fail "MOUNTS = $mount: gcsfuse is missing; SETUP can install it"
      sudo chown "$(id -un)" "$place"
      # A checkpoint gets its name when it is complete, a directory; and every worker must see that at once.
      gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 "${source#gs://}" "$place" ||
        fail "MOUNTS = $mount: not mounted"
      ;;
    *:/*) sudo mount -t nfs "$source" "$place" || fail "MOUNTS = $mount: not mounted" ;;
    *) fail "MOUNTS = $mount: must begin with host:/volume or gs://bucket" ;;
  esac
done

# The images of some TPU runtimes have Python 3.10.
environment() {
  local python
  for python in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv .venv && return 0
    fi
  done
  export PATH="$HOME/.local/bin:$PATH"
  command -v uv >/dev/null || python3 -m pip install -q --user uv || true
  command -v uv >/dev/null && uv venv -q --seed --python 3.12 .venv
}

wanted=$(cat setup.cfg launch/constraints.txt - <<<"$libtpu" | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  rm -rf .venv
  environment || fail "no Python 3.11 or newer, and uv cannot make one; SETUP can install python3.11 and python3.11-venv"
  .venv/bin/pip install -q -c launch/constraints.txt -e '.[tpu,hf]' || fail "pip could not install cola_jax"
  # Afterwards, because jax asks for another one.
  if [ -n "$libtpu" ]; then .venv/bin/pip install -q "libtpu==$libtpu" || fail "LIBTPU = $libtpu: not installed"; fi
  echo "$wanted" >.venv/installed
fi
