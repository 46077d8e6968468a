#!/usr/bin/env bash
# Train on the GPUs of a SLURM cluster; the job is requeued at the time limit and after preemption, and resumes.
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/var.py:d16 --workdir=$SCRATCH/runs/d16 \
#       --config.data.dir=$SCRATCH/data --config.tokenizer=$SCRATCH/runs/tokenizer
#
# Arguments after the script are passed to train.py.  Submit from the repository, with .venv created there by
# `python3 -m venv .venv && .venv/bin/pip install -e '.[cuda13]'`; workdir and data must be visible to all nodes.
#
# There is one process per GPU, and every process sees all GPUs of its node: JAX finds the processes from
# SLURM's environment variables and uses the GPU number SLURM_LOCALID.  (Do not use --gpus-per-task: it hides
# the other GPUs, and then all processes except the first ask for a GPU that they do not see.)
#
# Not run on a SLURM cluster.  Its handling of signals is tested with fakes of srun and scancel.
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
# --signal: SLURM signals only this shell (B:) 120 s before the time limit, and before a preemption if the
# cluster has PreemptParameters=send_user_signal.  The shell forwards SIGTERM to every python process, which
# saves and exits; then it puts the job back in the queue.  In other preemptions SLURM itself sends SIGTERM to
# the python processes, and requeues the job (--requeue) if it still exists at the end of GraceTime.
set -euo pipefail

: "${SLURM_JOB_ID:?submit with sbatch, from the repository: sbatch launch/slurm.sh --config=...}"
GRACE=${GRACE:-120} # seconds, more than the cluster's GraceTime

told=0
# scancel signals the job steps and not this shell.
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# Do not kill all processes when one exits (--kill-on-bad-exit): another may still be writing the checkpoint.
# If a process dies, JAX ends the others.
srun --kill-on-bad-exit=0 .venv/bin/python train.py "$@" &
pythons=$!
while true; do # a signal interrupts `wait` while python is still saving
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
