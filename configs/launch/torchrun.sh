#!/bin/bash
# configs/launch/torchrun.sh configs/folder_128.yaml data.name=path/to/pictures output_dir=runs/mine
# All GPUs of one machine with torchrun instead of accelerate launch. For several machines, start it on each with
# NNODES=2 FIRST=address-of-the-first. Not yet run on GPUs.
set -eu
torchrun --nnodes="${NNODES:-1}" --nproc-per-node="${GPUS:-gpu}" \
    --rdzv-id=sfumato --rdzv-backend=c10d --rdzv-endpoint="${FIRST:-localhost}:29500" training/train.py "$@"
