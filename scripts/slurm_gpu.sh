#!/bin/bash
# One run on all GPUs of several nodes under Slurm, a process for each GPU. Not run on a cluster.
#
#   sbatch scripts/slurm_gpu.sh --config=configs/qkd.py:data=imagenet2012 --workdir=/shared/runs/qkd
#
# The work directory is process 0's alone, on any disk of its node that a requeued job finds again.
#SBATCH --job-name=qkd_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4       # JAX gives each task its GPU; --gpus-per-task would hide the others
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue               # preempted jobs come back by themselves, others below
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120       # srun's tasks save and exit with code 75, 120 s before the end

# Preemption sends TERM to this shell too, which must live on to requeue the job.
trap : TERM

# Where one task dies the others say which, save nothing more, and end with 75 by themselves.
srun --kill-on-bad-exit=0 python launch.py "$@" &
task=$! code=0
while kill -0 "$task" 2>/dev/null; do
    wait "$task" && code=0 || code=$?  # TERM ends a wait, not srun
done

# 75: saved, or a task died; srun has the highest code, so the dead task's own where it was killed:
# 137 by KILL, 143 by TERM before the run was up. The same command resumes after each.
case "$code" in
    75 | 137 | 143)
        [ "${SLURM_RESTART_COUNT:-0}" -ge 50 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
