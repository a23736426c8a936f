#!/bin/bash
# sbatch configs/launch/slurm.sh configs/folder_128.yaml data.name=/shared/pictures output_dir=/shared/runs/mine
# Several machines under Slurm: torchrun on each, with one process per GPU. The run folder and data.cache_dir must be on a disk
# that all machines share. Slurm's SIGTERM before the time limit saves a checkpoint; the same command, submitted again,
# continues from it. After a node failure or preemption, --requeue starts it again. One machine: sbatch --nodes=1 ...
# Not yet run on a cluster; torchrun with two nodes on one machine is tested (tests/test_launch.py).
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    training/train.py "$@" train.mixed_precision=bf16 checkpoint.resume=auto
