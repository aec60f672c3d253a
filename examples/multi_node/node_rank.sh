#!/usr/bin/env bash
# By hand: once on each node, with its number and the address of node 0; Lightning starts the node's other processes.
#   NODE_RANK=0 MASTER_ADDR=node0 bash examples/multi_node/node_rank.sh --model.policy.path runs/sft/model \
#     --model.reward.path runs/reward/model --data.train prompts.jsonl
set -euo pipefail
export NODE_RANK=${NODE_RANK:?number of this node, from 0} MASTER_ADDR=${MASTER_ADDR:?address of node 0}
export MASTER_PORT=${MASTER_PORT:-29500}  # a port of node 0 that is free

exec lightning-rlhf fit --config ppo --config examples/multi_node/multi_node.yaml "$@"
