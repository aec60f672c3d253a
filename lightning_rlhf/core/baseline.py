"""Baselines of a response's reward, which lower the variance of the gradient and keep its expectation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.checks import check_finite, check_unit_interval
from lightning_rlhf.core.groups import group_size, group_sum
from lightning_rlhf.core.masked import AllSum, masked_mean


@dataclass(frozen=True, kw_only=True)
class Baseline(Adaptive, ABC):
    """Baseline b(x), subtracted from the reward of a response to x."""

    @property
    def needs_value(self) -> bool:
        """True if V(x) enters, so that a value network must be trained."""
        return False

    @property
    def needs_group(self) -> bool:
        """True if a prompt needs several responses."""
        return False

    @abstractmethod
    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Compute the baseline of each response.

        Args:
            totals: r_φ − β·log(π_old/π_ref) of each response, (B,), reward units.
            values: V(x) of its prompt, (B,), reward units; zeros without a value network.
            groups: which prompt each response answers, (B,), int64.
            all_sum: sums a tensor over processes.

        Returns:
            (B,), reward units.
        """

    def adapted(self, mean: float) -> Self:
        """Return the baseline of the next rollout.

        Args:
            mean: of `totals`, over all processes.

        Returns:
            the successor; itself unless the class adapts.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class NoBaseline(Baseline):
    """Zero baseline: the advantage is r − β·log(π/π_SFT), unbiased; its variance grows with the mean reward."""

    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return a baseline of 0 for each response."""
        return torch.zeros_like(totals)


@dataclass(frozen=True, kw_only=True)
class BatchMean(Baseline):
    """Baseline b = the mean reward of the rollout, over all processes.

    A response takes part in its own baseline, so the expected gradient shrinks by (n − 1)/n, n responses.
    """

    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return the rollout's mean in every entry."""
        return masked_mean(totals, torch.ones_like(totals, dtype=torch.bool), all_sum).expand_as(totals)


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Baseline):
    """Baseline b_i = the mean reward of the *other* responses to the prompt (RLOO; Ahmadian et al. 2024).

    A response takes no part in its own baseline, so the gradient is unbiased:
    R_i − b_i = k/(k − 1)·(R_i − mean), k responses.
    """

    @property
    def needs_group(self) -> bool:
        """True, because other responses to the prompt enter."""
        return True

    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Compute (Σ_j R_j − R_i) / (k − 1).

        Raises:
            ValueError: a prompt has a single response.
        """
        others = group_size(groups) - 1
        if not bool(others.all()):
            raise ValueError("`LeaveOneOut` needs at least 2 responses to each prompt: got a prompt with 1")
        return (group_sum(totals, groups) - totals) / others


@dataclass(frozen=True, kw_only=True)
class RunningMean(Baseline):
    """Baseline b = the exponentially weighted mean reward of past rollouts; unbiased, as no action enters.

    m ← d·m + (1 − d)·mean;  b = m / (1 − dᵏ) after k rollouts, 0 before the first.
    """

    decay: float = 0.9
    """d in [0, 1): 0 keeps the last rollout only."""
    mean: float = 0.0
    """m at the start, reward units."""
    weight: float = 0.0
    """Accumulated weight 1 − dᵏ of m."""

    def __post_init__(self) -> None:
        check_unit_interval(decay=self.decay, weight=self.weight)
        check_finite(mean=self.mean)
        if self.decay == 1:
            raise ValueError("`decay` must be below 1: with 1 the mean would never move")
        if self.mean != 0 and self.weight == 0:
            raise ValueError(f"`mean` without `weight` counts for nothing: got {self.mean}; set `weight` in (0, 1]")

    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return m / (1 − dᵏ) in every entry."""
        return torch.full_like(totals, self.mean / self.weight if self.weight else 0.0)

    def moving(self) -> tuple[str, ...]:
        """Names of m and its weight."""
        return ("mean", "weight")

    def adapted(self, mean: float) -> Self:
        """Return the baseline with one more rollout included.

        Raises:
            ValueError: `mean` is not finite.
        """
        check_finite(mean=mean)
        new = 1 - self.decay
        return replace(self, mean=self.decay * self.mean + new * mean, weight=self.decay * self.weight + new)


@dataclass(frozen=True, kw_only=True)
class LearnedValue(Baseline):
    """Baseline b = V(x) of a value network that sees the prompt alone: the bandit's critic. Unbiased."""

    @property
    def needs_value(self) -> bool:
        """True, because V(x) enters."""
        return True

    def __call__(self, totals: Tensor, values: Tensor, *, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return V(x) for each response, (B,)."""
        return values
