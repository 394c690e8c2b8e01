#!/usr/bin/env bash
# TinyLlama 1.1B on 2 nodes x 8 A100 under torchrun, which starts all ranks again when one fails. On each node:
#   MASTER_ADDR=node-a ./scripts/torchrun_2_nodes.sh               # the name or address of one of the two
#   MASTER_ADDR=node-a ./scripts/torchrun_2_nodes.sh --set train.max_steps=1000
#
#   a step      16 ranks x 8 micro x 8 accumulation x 2,048 tokens = 2,097,152 tokens
#   a restart   costs the steps since the last checkpoint, at most 5,000 x 5.5 s = 7.6 hours, so here it is
#               500 steps = 46 minutes: 13.2 GB every 46 minutes
#   the end     a rank that dies, fails or hangs ends all of them within half a minute, and torchrun begins anew
#
# torchrun comes with the torch of scripts/setup.sh; no Python of ours runs under it (--no-python). Rank 0 writes on the
# terminal of its node, the others into OUT_DIR/logs/. Without torchrun the same run is, on each node n:
#   NODE_RANK=n MASTER_ADDR=node-a MASTER_PORT=29500 tinyllama pretrain CONFIG --devices 8 --set num_nodes=2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${MASTER_ADDR:?set MASTER_ADDR to the first node, e.g. MASTER_ADDR=node-a}"

exec .venv/bin/torchrun --no-python --nnodes 2 --nproc-per-node "${GPUS:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id tinyllama \
  target/release/tinyllama pretrain configs/tinyllama.yaml \
  --resume auto --set train.save_interval=500 "$@"
