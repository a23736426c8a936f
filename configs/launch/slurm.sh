#!/bin/bash
# sbatch configs/launch/slurm.sh configs/folder_128.yaml data.name=/shared/pictures output_dir=/shared/runs/mine
# Several machines under Slurm: torchrun on each, as many processes as it has GPUs. The run folder and data.cache_dir lie on a
# disk that all machines see. Slurm's SIGTERM before the end saves a checkpoint, and --requeue goes on from it.
# Not yet run on a cluster; torchrun on two machines that are one is (tests/test_launch.py).
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    training/train.py "$@" train.mixed_precision=bf16 checkpoint.resume=auto
