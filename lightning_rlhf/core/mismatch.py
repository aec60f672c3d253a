"""Corrections for tokens sampled by another policy than the trained one.

Causes are low precision, other kernels (an engine such as vLLM) or a stale copy of the weights.
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
from lightning_rlhf.core.level import ActionLevel, SequenceLevel
from lightning_rlhf.core.surrogate import PerAction, SamplerWeights, Surrogate, importance_ratio


@dataclass(frozen=True, kw_only=True)
class MismatchIS(Surrogate, ABC):
    """Surrogate whose losses are multiplied by a detached function of w = π_old(a|s) / π_sampler(a|s).

    E_sampler[w·loss] = E_old[loss] for whole responses, up to the truncation; per token, as is usual, the tokens before
    it stay uncorrected. Do not also take π_sampler for π_old: that counts w twice. The KL that `KLInLoss` adds is not
    weighted, as in TRL: where the sampler differs much, its gradient is another unless it is `unbiased`. `KLInReward`
    is weighted.

    Corrections may stand inside one another: the outer one corrects the weights of the inner one. They count w once,
    and so at one level: that which any of them names.
    """

    surrogate: Surrogate = field(default_factory=Clip)
    """Surrogate whose loss is weighted."""
    level: ActionLevel | None = None
    """Level of w; None: the actions, under `GeometricLevel` the whole response. Where actions are tokens,
    `SequenceLevel` gives all tokens of a response the weight exp(Σ_t log π_old − log π_sampler), which is exact and of
    high variance (sequence-level TIS and MIS; Liu et al. 2025, "When Speed Kills Stability"), `GeometricLevel` the
    geometric mean of their weights."""

    @property
    def adaptive(self) -> bool:
        """True if the inner surrogate is adaptive."""
        return self.surrogate.adaptive

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the inner surrogate's loss."""
        return self.surrogate(log_ratio, advantages)

    def weights(
        self, logprobs: Tensor, sampler_logprobs: Tensor, response: Tensor, level: ActionLevel
    ) -> SamplerWeights:
        """Correct w, taken at the level of the correction.

        Args:
            logprobs: log π_old per token, (B, R), nats.
            sampler_logprobs: log π_sampler per token, (B, R), nats.
            response: (B, R), bool.
            level: what an action is.
        """
        named = self.named_levels()
        if named:
            log_ratio = named[0].log_ratio(logprobs, sampler_logprobs, response)
        else:
            log_ratio = level.total(logprobs - sampler_logprobs, response)
        ratio = importance_ratio(log_ratio)
        applied = self.corrected(ratio)
        return SamplerWeights(applied, ratio, (applied != ratio).to(ratio))

    def named_levels(self) -> list[ActionLevel]:
        """Return the different levels that this correction and those inside it name."""
        inner = self.surrogate.named_levels() if isinstance(self.surrogate, MismatchIS) else []
        return inner if self.level is None or self.level in inner else [self.level, *inner]

    def corrected(self, ratio: Tensor) -> Tensor:
        """Apply the correction to w of any shape, after those inside it."""
        return self.correction(self.surrogate.corrected(ratio) if isinstance(self.surrogate, MismatchIS) else ratio)

    @abstractmethod
    def correction(self, ratio: Tensor) -> Tensor:
        """Compute the correction of w = π_old / π_sampler, (B, T).

        Args:
            ratio: w of each action, or (B, 1) of whole responses.

        Returns:
            the same shape.
        """

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


@dataclass(frozen=True, kw_only=True)
class NoCorrection(MismatchIS):
    """Weight 1: the sampler is taken for the trainer.

    It says so on purpose where an external engine samples, which puts a surrogate into `TruncatedIS` by default.
    `level` is that of `policy/sampler_ess`.
    """

    def __post_init__(self) -> None:
        check_fields(self)

    def weights(
        self, logprobs: Tensor, sampler_logprobs: Tensor, response: Tensor, level: ActionLevel
    ) -> SamplerWeights:
        """Leave the losses as they are, and count none of them as changed.

        Args:
            logprobs: log π_old per token, (B, R), nats.
            sampler_logprobs: log π_sampler per token, (B, R), nats.
            response: (B, R), bool.
            level: what an action is.
        """
        weights = super().weights(logprobs, sampler_logprobs, response, level)
        return weights._replace(changed=torch.zeros_like(weights.ratio))

    def correction(self, ratio: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(ratio)


def check_levels(surrogate: Surrogate, actions: ActionLevel) -> None:
    """Raise ValueError unless corrections name one level at most, of the actions or of whole responses.

    Args:
        surrogate: corrected or not.
        actions: what an action is.
    """
    named = surrogate.named_levels() if isinstance(surrogate, MismatchIS) else []
    if len(named) > 1:
        levels = " and ".join(type(level).__name__ for level in named)
        raise ValueError(
            f"corrections inside one another count π_old/π_sampler once, but `level` names {levels}: name it in one"
        )
    for level in named:
        if level != actions and not isinstance(level, SequenceLevel):
            raise ValueError(
                f"{type(surrogate).__name__}(level={type(level).__name__}()) weights parts of an action, but an action "
                f"of {type(actions).__name__} has one loss: leave `level` out, take SequenceLevel() or "
                "GeometricLevel(), or set the algorithm's `level` to it"
            )
