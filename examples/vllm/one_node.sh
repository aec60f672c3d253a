#!/usr/bin/env bash
# One node with eight GPUs: the server on GPU 0, training by ddp on 1 to 7. Written for GPUs and not run on any.
#   MODEL=... REWARD=my_rewards.brevity PROMPTS=prompts.jsonl VLLM=.venv-vllm/bin/python bash one_node.sh
set -euo pipefail

CUDA_VISIBLE_DEVICES=0 lightning-rlhf serve "$MODEL" --python "$VLLM" --port 8000 --max-model-len 4096 &
trap 'kill %1' EXIT

CUDA_VISIBLE_DEVICES=1,2,3,4,5,6,7 lightning-rlhf fit --config grpo --config strategy/ddp \
  --trainer.devices=7 --model.policy="$MODEL" --model.reward="$REWARD" --data.train="$PROMPTS" \
  --model.engine=VLLMServer --model.engine.urls='[http://127.0.0.1:8000]' --model.engine.patience=900 \
  --model.engine.overlap=true "$@"
