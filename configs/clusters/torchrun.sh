#!/bin/bash
# torchrun on machines without a scheduler: run this on each with its node number; node 0 is --master-addr.
#   bash configs/clusters/torchrun.sh 0        on worker-1
#   bash configs/clusters/torchrun.sh 1        on worker-2
exec python -m torch.distributed.run --nnodes=2 --node-rank="$1" --nproc-per-node=8 \
    --rdzv-backend=static --master-addr=worker-1 --master-port=15000 \
    --module bigmodel launch exec my.toml
