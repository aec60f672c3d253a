#!/usr/bin/env bash
# torchrun: once on each node; it starts the node's processes and numbers the nodes by itself.
#   MASTER_ADDR=node0 bash examples/multi_node/torchrun.sh --model.policy.path runs/sft/model \
#     --model.reward.path runs/reward/model --data.train prompts.jsonl
set -euo pipefail

exec torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id="${RUN_ID:-lightning-rlhf}" \
  --rdzv-endpoint="${MASTER_ADDR:?address of node 0}:${MASTER_PORT:-29500}" \
  -m lightning_rlhf fit --config ppo --config examples/multi_node/multi_node.yaml "$@"
