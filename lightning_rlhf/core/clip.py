"""Surrogates that bound the ratio: PPO's CLIP with its variants and CISPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative, check_positive
from lightning_rlhf.core.surrogate import PerAction, Surrogate, importance_ratio


@dataclass(frozen=True, kw_only=True)
class Clip(Surrogate):
    """Clipped surrogate −min(ρÂ, clip(ρ, 1 − ε, 1 + ε_high)Â) (PPO eq. 7).

    With one action per response ρ is the product of the token ratios and reaches the bounds sooner than a token's.
    """

    epsilon: float = 0.2
    """ε > 0: how far below 1 the ratio may be pushed, and above it where `epsilon_high` is None."""
    epsilon_high: float | None = None
    """ε_high > 0, above 1 ("clip-higher", DAPO; Yu et al. 2025, eq. 8); None is ε."""
    dual: float | None = None
    """c > 1: for Â < 0 the objective never falls below c·Â (dual clip; Ye et al. 2020); None: no floor."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        if self.epsilon_high is not None:
            check_positive(epsilon_high=self.epsilon_high)
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"`dual` must be above 1, beyond the ratios an update aims at: got {self.dual}")

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the pessimistic bound; an action counts as clipped if its loss has no gradient."""
        ratio = importance_ratio(log_ratio)
        plain = -ratio * advantages
        above = self.epsilon if self.epsilon_high is None else self.epsilon_high
        loss = torch.maximum(plain, -ratio.clamp(1 - self.epsilon, 1 + above) * advantages)
        clipped = loss > plain
        if self.dual is not None:
            floor = -self.dual * advantages
            fell = (advantages < 0) & (loss > floor)
            loss, clipped = torch.where(fell, floor, loss), clipped | fell
        return PerAction(loss, {"policy/clipfrac_avg": clipped.to(plain.dtype)})


@dataclass(frozen=True, kw_only=True)
class CISPO(Surrogate):
    """Surrogate −sg[clip(ρ, smallest, largest)]·Â·log π_θ, which clips the *weight* (MiniMax 2025, eqs. 4-5).

    No action loses its gradient, whatever its ratio. With ρ = 1 it is REINFORCE.
    """

    largest: float = 5.0
    """Largest weight, > 0, absolute. The paper does not disclose its 1 + ε_high; 5 is TRL's example, after ScaleRL."""
    smallest: float = 0.0
    """Smallest weight, ≥ 0 and not above `largest`; the paper has none."""

    def __post_init__(self) -> None:
        check_positive(largest=self.largest)
        check_not_negative(smallest=self.smallest)
        if self.smallest > self.largest:
            raise ValueError(f"`smallest` must not exceed `largest`: got {self.smallest} and {self.largest}")

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the loss up to a constant of log π_θ: it is 0 at π_old and only its gradient counts."""
        ratio = importance_ratio(log_ratio.detach())
        weight = ratio.clamp(self.smallest, self.largest)
        return PerAction(-weight * advantages * log_ratio, {"policy/clipfrac_avg": (weight != ratio).to(ratio.dtype)})
