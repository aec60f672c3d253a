"""Advantages within the responses to one prompt: GRPO and Dr. GRPO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rlhf.core.advantage import AdvantageEstimator, AdvantagesAndReturns, on_every_action
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.core.groups import group_mean, group_size, group_std
from lightning_rlhf.core.masked import AllSum, masked_variance


@dataclass(frozen=True, kw_only=True)
class GroupScale(ABC):
    """Base class of units for a response's distance from its group's mean."""

    @abstractmethod
    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Compute the unit of each response, (B,), in reward units > 0.

        Args:
            totals: reward of each response, (B,), reward units.
            groups: which prompt each response answers, (B,), int64.
            all_sum: sums a tensor over processes.
        """


@dataclass(frozen=True, kw_only=True)
class GroupStd(GroupScale):
    """Unbiased standard deviation of the group plus a guard (Shao et al. 2024, §4.1.2).

    It makes advantages blind to the scale of the reward, and weighs easy and hard prompts up (Liu et al. 2025, §3.1).
    The β of a KL in the loss is then in standard deviations of the reward (`KLInLoss`).
    """

    guard: float = 1e-4
    """Added to the standard deviation, > 0, reward units: TRL's number; the paper has none."""

    def __post_init__(self) -> None:
        check_positive(guard=self.guard)

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Compute std + guard of each group."""
        return group_std(totals, groups) + self.guard


@dataclass(frozen=True, kw_only=True)
class BatchStd(GroupScale):
    """Unbiased standard deviation of the rollout's rewards over all processes (Liu et al. 2025, 2508.08221).

    One unit serves all prompts, so that none is weighed up for having a small spread.
    """

    guard: float = 1e-4
    """Added to the standard deviation, > 0, reward units."""

    def __post_init__(self) -> None:
        check_positive(guard=self.guard)

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return the same number in every entry."""
        everything = torch.ones_like(groups, dtype=torch.bool)
        count = all_sum(everything.sum().to(totals.dtype))
        squares = count * masked_variance(totals, everything, all_sum)
        return ((squares / (count - 1).clamp(min=1)).sqrt() + self.guard).expand_as(totals)


@dataclass(frozen=True, kw_only=True)
class GroupMean(GroupScale):
    """Mean of the group, its pass rate where scores are 0 or 1 (MaxRL; Tajwar et al. 2026, 2602.02710).

    Rare solutions weigh more: with k responses to each prompt the expected gradient is that of Σ_{j<k} pass@j / j,
    which tends to the log of the pass rate. In a group without any reward the unit is 1.
    """

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return the mean of each response's group.

        Raises:
            ValueError: a reward is below 0.
        """
        if bool((totals < 0).any()):
            raise ValueError(
                f"`GroupMean` divides by a group's mean reward, for rewards such as 0 and 1: got {totals.min():g}; "
                "take GroupStd or NoScale, or a reward, shaping rules and a KL term that leave none below 0"
            )
        mean = group_mean(totals, groups)
        return torch.where(mean > 0, mean, torch.ones_like(mean))


@dataclass(frozen=True, kw_only=True)
class NoScale(GroupScale):
    """Unit 1, so that the advantage is the plain distance from the mean (Dr. GRPO; Liu et al. 2025, §3.2)."""

    def __call__(self, totals: Tensor, groups: Tensor, all_sum: AllSum) -> Tensor:
        """Return a unit of 1 for each response."""
        return torch.ones_like(totals)


@dataclass(frozen=True, kw_only=True)
class GroupAdvantage(AdvantageEstimator):
    """Advantage Âᵢ = (Rᵢ − mean of the group) / unit of every action (GRPO; Shao et al. 2024).

    With `GroupStd` it is GRPO's, with `NoScale` Dr. GRPO's. A group whose responses all earn the same gives 0. The
    mean counts the response itself, so without a unit and with the KL in the reward the expected gradient is (k − 1)/k
    of the unbiased one that `LeaveOneOut` has, k responses to each prompt. A KL in the loss is not shrunk (`KLInLoss`).
    """

    scale: GroupScale = field(default_factory=GroupStd)
    """Unit of the distance."""

    @property
    def needs_group(self) -> bool:
        """True, because the group's responses are compared."""
        return True

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Compute the distance from the group's mean in units of `scale`.

        Raises:
            ValueError: a prompt has a single response.
        """
        if bool((group_size(groups) < 2).any()):
            raise ValueError("`GroupAdvantage` needs at least 2 responses to each prompt: got a prompt with 1")
        totals = torch.where(mask, rewards, torch.zeros_like(rewards)).sum(1)
        distance = (totals - group_mean(totals, groups)) / self.scale(totals, groups, all_sum)
        flat = group_std(totals, groups) == 0  # there the mean's rounding is all that distance holds
        advantages = torch.where(flat, torch.zeros_like(distance), distance)
        return AdvantagesAndReturns(on_every_action(advantages, mask), on_every_action(totals, mask))
