#!/usr/bin/env bash
# Machines that ssh reaches, one process each; the first is the coordinator, and its lines are shown:
#
#   HOSTS="gpu1 gpu2" launch/ssh.sh --config=configs/paper_2b.py --workdir=/shared/runs/paper_2b
#
# The arguments are those of launch/train.py. This folder, with its .venv, and --workdir are on storage that all share.
# GPUs: launch/slurm.sh has why JAX is told how much of their memory it may take.
set -uo pipefail
: "${HOSTS:?names of the machines, with spaces between}"
read -ra hosts <<<"$HOSTS"
here=$(cd "$(dirname "$0")/.." && pwd)
arguments=$(printf '%q ' "$@")
processes=() fraction=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT
for index in "${!hosts[@]}"; do
  # -tt: the program gets the signal when this script does.
  ssh -tt "${hosts[$index]}" "cd $(printf %q "$here") && export XLA_PYTHON_CLIENT_MEM_FRACTION=$fraction && \
    exec .venv/bin/python launch/train.py $arguments \
    --coordinator=${hosts[0]}:${PORT:-8476} --process_count=${#hosts[@]} --process_id=$index" &
  processes+=($!)
done
status=0
for process in "${processes[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
