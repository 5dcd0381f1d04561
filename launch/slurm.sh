#!/usr/bin/env bash
# GPU nodes under SLURM, one process a node, queued again when time is up or a node is taken away:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/paper_2b.py --workdir=/shared/runs/paper_2b
#
# The arguments are those of launch/train.py, --workdir is on storage that all nodes share. The environment .venv was
# made before: python3.11 -m venv .venv && .venv/bin/pip install -c launch/constraints.txt -e '.[gpu,hf]'.
# Whole nodes, with all their memory and CPUs: a task that asks for none gets one CPU and a share of the memory.
#SBATCH --job-name=cola
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
if ! .venv/bin/python -c 'import jax' 2>/dev/null; then
  echo "error: $PWD/.venv: must be an environment with jax: see the header of launch/slurm.sh" >&2
  exit 2
fi
# JAX takes three quarters of a GPU's memory unless told otherwise, and --plan counts on more. The rest is for NCCL,
# whose buffers are not JAX's, and for CUDA itself.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# srun does not take over the CPUs of the job.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" \
  .venv/bin/python launch/train.py "$@"
status=$?
# Stopped by a signal (128 + its number, or a killed step) the run resumes from its checkpoint; errors do not repeat.
case "$status" in
  0 | 1 | 2 | 3) exit "$status" ;;
  *) if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then scontrol requeue "$SLURM_JOB_ID"; else exit "$status"; fi ;;
esac
