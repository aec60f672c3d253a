"""What a response's reward is compared with: lower variance, the same expected gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.masked import AllSum, masked_mean


@dataclass(frozen=True, kw_only=True)
class Baseline(ABC):
    """b(x), subtracted from the reward of a response to x."""

    @abstractmethod
    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """The baseline of each response.

        Args:
            totals: r_φ − β·log(π_old/π_ref) of each response, (B,), reward units.
            groups: which prompt each response answers, (B,), int64.
            all_sum: sums a tensor over processes.

        Returns:
            (B,), reward units.
        """


@dataclass(frozen=True, kw_only=True)
class NoBaseline(Baseline):
    """b = 0: the advantage is r − β·log(π/π_SFT) itself. Unbiased; its variance grows with the mean reward."""

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Zeros."""
        return torch.zeros_like(totals)


@dataclass(frozen=True, kw_only=True)
class BatchMean(Baseline):
    """b = the mean reward of the rollout, over all processes.

    A response takes part in its own baseline, so the expected gradient shrinks by (n − 1)/n, n responses.
    """

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """The rollout's mean, in every entry."""
        return masked_mean(totals, torch.ones_like(totals, dtype=torch.bool), all_sum).expand_as(totals)
