"""A surrogate of your own: PPO's CLIP with a smooth knee, so that the gradient fades out instead of stopping.

    PYTHONPATH=examples/own_surrogate lightning-rlhf fit --config ppo \
        --config examples/own_surrogate/own_surrogate.yaml --model.policy.path runs/sft/model \
        --model.reward.path runs/reward/model --data.train prompts.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf import Surrogate
from lightning_rlhf.core import PerAction, importance_ratio


@dataclass(frozen=True, kw_only=True)
class SoftClip(Surrogate):
    """−min(ρÂ, bend(ρ)Â) with bend(ρ) = 1 + ε·tanh((ρ − 1)/ε): slope 1 at ρ = 1, bounds 1 − ε and 1 + ε."""

    epsilon: float = 0.2
    """ε > 0."""

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"`epsilon` must be above 0: got {self.epsilon}")

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        ratio = importance_ratio(log_ratio)
        bend = 1 + self.epsilon * torch.tanh((ratio - 1) / self.epsilon)
        return PerAction(torch.maximum(-ratio * advantages, -bend * advantages), {"policy/bend": (ratio - bend).abs()})
