"""Reward of every action: the response's score less the price of the KL to the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def penalized_rewards(scores: Tensor, kl_ref: Tensor, mask: Tensor, *, coef: float) -> Tensor:
    """Per-action reward: −β·kl, plus the score on the last action (Ouyang et al. 2022, eq. 2).

    rₜ = −β (log π_old(aₜ|sₜ) − log π_ref(aₜ|sₜ)) + 1[t = last] · r_φ(x, y)

    With T = 1, the bandit, this is r_φ(x, y) − β·log(π_old(y|x) / π_ref(y|x)).

    Args:
        scores: r_φ(x, y), (B,), float.
        kl_ref: log π_old − log π_ref of each action, (B, T), nats.
        mask: actions that count, (B, T), bool, at least one per row.
        coef: β ≥ 0.

    Returns:
        rewards, (B, T), 0 where masked; their sum over T is the bandit's reward.

    Raises:
        ValueError: the shapes do not match.
    """
    if scores.shape != kl_ref.shape[:1] or mask.shape != kl_ref.shape:
        raise ValueError(
            "`scores` (B,), `kl_ref` (B, T) and `mask` (B, T) must match: "
            f"got {tuple(scores.shape)}, {tuple(kl_ref.shape)} and {tuple(mask.shape)}"
        )
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = steps == torch.where(mask, steps, -1).amax(1, keepdim=True)
    rewards = -coef * kl_ref + torch.where(last, scores.to(kl_ref.dtype).unsqueeze(1), 0.0)
    return torch.where(mask, rewards, torch.zeros_like(rewards))
