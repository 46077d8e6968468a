#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster; requeued at the time limit and after preemption, it goes on.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/var.py:d16 --workdir=$SCRATCH/runs/d16 \
#       --config.data.dir=$SCRATCH/data --config.tokenizer=$SCRATCH/runs/tokenizer
#
# What follows the script is given to train.py.  Submit from the repository, with .venv made there by
# `python3 -m venv .venv && .venv/bin/pip install -e '.[cuda]'`; workdir and data must be visible to all nodes.
#
# One process a GPU, and every process sees all GPUs of its node: JAX finds the processes by SLURM's
# variables and takes the GPU of its SLURM_LOCALID.  (Not --gpus-per-task: it hides the others, and then all
# but the first process ask for a GPU that they do not see.)
#
# Not run so far: no SLURM cluster was at hand.  Its signals are tested with stand-ins for srun and scancel.
#
#SBATCH --job-name=var_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm_%j.log
#SBATCH --signal=B:TERM@120
#
# --signal: SLURM warns this shell, and it alone (B:), 120 s before the time limit, and before a preemption
# where the cluster has PreemptParameters=send_user_signal.  The shell hands SIGTERM on to every python, which
# saves and ends; then it puts the job back in the queue.  In other preemptions SLURM itself sends SIGTERM
# to the pythons, and requeues the job (--requeue) if it is still there when GraceTime is over.
set -euo pipefail

: "${SLURM_JOB_ID:?submit with sbatch, from the repository: sbatch launch/slurm.sh --config=...}"
GRACE=${GRACE:-120} # seconds, more than the cluster's GraceTime

told=0
# By scancel, whose signals go to the steps and not to this shell.
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# Not killed when one of them ends (as --kill-on-bad-exit would): another may still be writing the checkpoint.
# A process that dies is noticed by JAX, which then ends the others.
srun --kill-on-bad-exit=0 .venv/bin/python train.py "$@" &
pythons=$!
while true; do # a signal ends `wait` early, while python is still saving
  code=0
  wait "$pythons" || code=$?
  kill -0 "$pythons" 2> /dev/null || break
done

if ((told && code)); then
  echo "slurm.sh: told to end; putting job $SLURM_JOB_ID back in the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
elif ((code)); then
  echo "slurm.sh: ended with $code; staying $GRACE s, so that SLURM finds the job where it was a preemption" >&2
  sleep "$GRACE"
fi
exit "$code"
