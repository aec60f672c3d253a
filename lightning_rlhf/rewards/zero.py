"""Reward of nothing, for runs that learn from the reference alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.rewards.reward import Reward
from lightning_rlhf.types import Rollout, Row


class ZeroReward(Reward):
    """Reward 0 of every response: on-policy distillation, where the teacher is the reference."""

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return zeros, (B,), float32."""
        return torch.zeros(len(rollout), device=rollout.tokens.device)
