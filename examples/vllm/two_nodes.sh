#!/usr/bin/env bash
# Two nodes with eight GPUs each and a folder that both see: the second serves with its GPUs, the first trains by ddp.
# Written for GPUs and not run on any. On either node, with MODEL and SHARED set, and SERVER the second's address:
#   bash two_nodes.sh serve                                        # on the second
#   REWARD=my_rewards.brevity PROMPTS=prompts.jsonl bash two_nodes.sh train   # on the first
set -euo pipefail

case "$1" in
  serve)
    exec lightning-rlhf serve "$MODEL" --python "$VLLM" --host 0.0.0.0 --private-network --port 8000 \
      --tensor-parallel-size 8 --max-model-len 4096
    ;;
  train)
    exec lightning-rlhf fit --config grpo --config strategy/ddp --trainer.devices=8 --model.policy="$MODEL" \
      --model.reward="$REWARD" --data.train="$PROMPTS" --model.engine=VLLMServer \
      --model.engine.urls="[http://$SERVER:8000]" --model.engine.private_network=true --model.engine.patience=900 \
      --model.engine.sync=SharedFolder --model.engine.sync.folder="$SHARED" --model.engine.overlap=true "${@:2}"
    ;;
  *)
    echo "usage: two_nodes.sh serve|train" >&2
    exit 2
    ;;
esac
