"""Corrections for tokens sampled by weights other than the trained ones.

Causes are low precision, another kernel or a stale copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.core.clip import Clip
from lightning_rlhf.core.surrogate import PerAction, Surrogate, importance_ratio


@dataclass(frozen=True, kw_only=True)
class MismatchIS(Surrogate, ABC):
    """Surrogate whose losses are multiplied by a detached function of w = π_old(a|s) / π_sampler(a|s).

    E_sampler[w·loss] = E_old[loss] for whole responses, up to the truncation; per token, as is usual, the tokens before
    it stay uncorrected. Do not also take π_sampler for π_old: that counts w twice. The KL that `KLInLoss` adds is not
    weighted, as in TRL: where the sampler differs much, its gradient is another. `KLInReward` is weighted.
    """

    surrogate: Surrogate = field(default_factory=Clip)
    """Surrogate whose loss is weighted."""

    @property
    def adaptive(self) -> bool:
        """True if the inner surrogate is adaptive."""
        return self.surrogate.adaptive

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the inner surrogate's loss."""
        return self.surrogate(log_ratio, advantages)

    def weights(self, mismatch: Tensor) -> Tensor:
        """Apply the correction to w, after that of an inner one."""
        inner = self.surrogate
        corrected = isinstance(inner, MismatchIS)
        return self.correction(inner.weights(mismatch) if corrected else importance_ratio(mismatch))

    @abstractmethod
    def correction(self, ratio: Tensor) -> Tensor:
        """Compute the correction of w = π_old / π_sampler, (B, T)."""

    def adapted(self, kl_old: float) -> Self:
        """Return the surrogate with the inner surrogate of the next rollout."""
        return replace(self, surrogate=self.surrogate.adapted(kl_old))


@dataclass(frozen=True, kw_only=True)
class TruncatedIS(MismatchIS):
    """Weight min(w, cap): truncated importance sampling (TIS; Yao et al. 2025)."""

    cap: float = 2.0
    """Largest weight C > 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(cap=self.cap)

    def correction(self, ratio: Tensor) -> Tensor:
        """Truncate the weights to min(w, C)."""
        return ratio.clamp(max=self.cap)


@dataclass(frozen=True, kw_only=True)
class MaskedIS(MismatchIS):
    """Weight w inside [smallest, largest] and 0 outside, where the two policies disagree (IcePop, MIS)."""

    smallest: float = 0.5
    """Smallest weight, ≥ 0 and below `largest`."""
    largest: float = 2.0
    """Largest weight, > 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(largest=self.largest)
        if not (math.isfinite(self.smallest) and 0 <= self.smallest < self.largest):
            raise ValueError(f"`smallest` must lie in [0, largest): got {self.smallest} with largest={self.largest}")

    def correction(self, ratio: Tensor) -> Tensor:
        """Return w, or 0 outside the bounds."""
        inside = (ratio >= self.smallest) & (ratio <= self.largest)
        return torch.where(inside, ratio, torch.zeros_like(ratio))
