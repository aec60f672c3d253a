"""Surrogates that fade an action out smoothly where its ratio leaves 1: SAPO and VESPO."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative, check_positive
from lightning_rlhf.core.surrogate import PerAction, Surrogate, importance_ratio

LOG_WEIGHT_BOUNDS = (math.log(1e-8), 20.0)
"""Bounds of log W in VESPO's weight, in nats, as in TRL: the weight is 0 to float precision beyond either."""


@dataclass(frozen=True, kw_only=True)
class SAPO(Surrogate):
    """Soft gate −(4/τ)·σ(τ(ρ − 1))·Â instead of a clip, τ by the sign of Â (Gao et al. 2025, 2511.20347).

    Its gradient is that of −ρÂ times 4·p(1 − p), p = σ(τ(ρ − 1)): 1 at ρ = 1 and falling on both sides, never to 0
    at once. As τ → 0 it is −ρÂ up to a constant.
    """

    temperature_positive: float = 1.0
    """τ > 0 of actions with Â > 0."""
    temperature_negative: float = 1.05
    """τ > 0 of the others; above the first, so that what lowers a token's probability fades sooner."""

    def __post_init__(self) -> None:
        check_positive(temperature_positive=self.temperature_positive, temperature_negative=self.temperature_negative)

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute −(4/τ)·σ(τ(ρ − 1))·Â for each action."""
        temperature = _by_sign(advantages > 0, self.temperature_positive, self.temperature_negative, like=advantages)
        gate = torch.sigmoid(temperature * (importance_ratio(log_ratio) - 1)) * 4 / temperature
        return PerAction(-gate * advantages, {})


@dataclass(frozen=True, kw_only=True)
class VESPO(Surrogate):
    """Loss −sg[φ(W)]·Â·log ρ with the weight φ(w) = e^λ·w^k·e^(−λw) of a whole response (VESPO, 2602.10693).

    W is the ratio π_θ/π_old of the response, so that an action must be one (`SequenceLevel`). φ(1) = 1, φ peaks at
    w = k/λ and falls to 0 on both sides; at π_old the gradient is REINFORCE's. Where the sampler is not the trainer,
    TRL multiplies W by π_old/π_sampler; here `TruncatedIS` or `MaskedIS` around this surrogate weighs the loss.
    """

    k_positive: float = 2.0
    """k ≥ 0 of responses with Â ≥ 0: how fast φ falls below its peak."""
    lambda_positive: float = 3.0
    """λ > 0 of responses with Â ≥ 0: how fast φ falls above its peak."""
    k_negative: float = 3.0
    """k ≥ 0 of responses with Â < 0."""
    lambda_negative: float = 2.0
    """λ > 0 of responses with Â < 0."""

    def __post_init__(self) -> None:
        check_not_negative(k_positive=self.k_positive, k_negative=self.k_negative)
        check_positive(lambda_positive=self.lambda_positive, lambda_negative=self.lambda_negative)

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the loss up to a constant of log π_θ: it is 0 at π_old and only its gradient counts."""
        return PerAction(-self.weight(log_ratio, advantages) * advantages * log_ratio, {})

    def weight(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """Return φ(W) ≥ 0 of each response without gradient, in the shape of `log_ratio`.

        Args:
            log_ratio: log W, any shape, nats.
            advantages: Â, of the same shape.
        """
        positive = advantages >= 0
        k = _by_sign(positive, self.k_positive, self.k_negative, like=advantages)
        rate = _by_sign(positive, self.lambda_positive, self.lambda_negative, like=advantages)
        log_weight = log_ratio.detach().clamp(*LOG_WEIGHT_BOUNDS)
        return (k * log_weight - rate * log_weight.expm1()).exp()


def _by_sign(positive: Tensor, above: float, below: float, *, like: Tensor) -> Tensor:
    """Return one number where `positive` is True and the other elsewhere, in the dtype of `like`."""
    return torch.where(positive, torch.full_like(like, above), torch.full_like(like, below))
