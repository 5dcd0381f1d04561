#!/usr/bin/env bash
# GPU nodes under SLURM, one process a node, queued again when time is up or a node is taken away:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/paper_2b.py --workdir=/shared/runs/paper_2b
#
# The arguments are those of launch/train.py, --workdir is on storage that all nodes share. The environment .venv was
# made before: python3 -m venv .venv && .venv/bin/pip install -e '.[gpu]'.
#SBATCH --job-name=cola
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
srun --kill-on-bad-exit=1 .venv/bin/python launch/train.py "$@"
status=$?
# Stopped by a signal (128 + its number, or a killed step) the run resumes from its checkpoint; errors do not repeat.
case "$status" in
  0 | 1 | 2 | 3) exit "$status" ;;
  *) if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then scontrol requeue "$SLURM_JOB_ID"; else exit "$status"; fi ;;
esac
