"""Advantages: the difference of an action's reward from the expected one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.baseline import Baseline, NoBaseline
from lightning_rlhf.core.checks import check_unit_interval
from lightning_rlhf.core.masked import AllSum, whiten


class AdvantagesAndReturns(NamedTuple):
    """Advantages of a rollout with the targets of the value network.

    Attributes:
        advantages: Â, (B, T), reward units, 0 where masked.
        returns: targets of the value network, (B, T), reward units, 0 where masked.
    """

    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True, kw_only=True)
class AdvantageEstimator(Adaptive, ABC):
    """Base class of estimators that turn rewards into advantages."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_value(self) -> bool:
        """True if V(s) enters, so that a value network must be trained."""
        return False

    @property
    def needs_group(self) -> bool:
        """True if several responses to one prompt are compared."""
        return False

    @abstractmethod
    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Estimate the advantages and returns of a rollout.

        Args:
            rewards: per action, (B, T), 0 where masked.
            values: V of the state before each action, (B, T); zeros without a value network.
            mask: actions that count, (B, T), bool.
            groups: which prompt each row answers, (B,), int64, for baselines per prompt.
            all_sum: sums a tensor over processes.
        """

    def adapted(self, mean: float) -> Self:
        """Return the estimator of the next rollout.

        Args:
            mean: over the rollout's responses, of all processes, of their whole reward r − β·log(π_old/π_ref).

        Returns:
            the successor; itself unless the class adapts.
        """
        return self


def on_every_action(x: Tensor, mask: Tensor) -> Tensor:
    """Copy a number per response, (B,), to each of its actions, (B, T); 0 where masked."""
    return torch.where(mask, x.unsqueeze(1), torch.zeros_like(x).unsqueeze(1))


@dataclass(frozen=True, kw_only=True)
class BanditAdvantage(AdvantageEstimator):
    """A = r − β·log(π_old/π_SFT) − b(x), the same for every action of a response.

    The contextual bandit of Ouyang et al. 2022, §3.5: one prompt, one response, one reward. With the default
    b = 0 there is no value baseline at all.
    """

    baseline: Baseline = field(default_factory=NoBaseline)
    """The baseline b(x)."""

    @property
    def needs_value(self) -> bool:
        """True if the baseline needs a value network."""
        return self.baseline.needs_value

    @property
    def needs_group(self) -> bool:
        """True if the baseline compares several responses to one prompt."""
        return self.baseline.needs_group

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Compute Σ_t r_t − b(x) on every action."""
        totals = torch.where(mask, rewards, torch.zeros_like(rewards)).sum(1)
        centered = totals - self.baseline(totals, values[:, 0], groups=groups, all_sum=all_sum)
        return AdvantagesAndReturns(on_every_action(centered, mask), on_every_action(totals, mask))

    def adapted(self, mean: float) -> Self:
        """Return the estimator with the baseline of the next rollout."""
        return replace(self, baseline=self.baseline.adapted(mean))


@dataclass(frozen=True, kw_only=True)
class GAE(AdvantageEstimator):
    """Generalized advantage estimation (Schulman et al. 2016; PPO eqs. 11-12).

    δₜ = rₜ + γ·V(sₜ₊₁) − V(sₜ);  Âₜ = δₜ + γλ·Âₜ₊₁;  R̂ₜ = Âₜ + V(sₜ)

    t counts actions: what an environment wrote between two of them takes no step and is not discounted.
    """

    gamma: float = 1.0
    """Discount, in [0, 1]; InstructGPT does not discount."""
    lam: float = 0.95
    """λ in [0, 1]: 1 is reward-to-go less V, 0 the one-step error."""

    def __post_init__(self) -> None:
        check_unit_interval(gamma=self.gamma, lam=self.lam)

    @property
    def needs_value(self) -> bool:
        """True, because V(s) enters."""
        return True

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Compute Âₜ by a backward sweep over actions; the state after the last one is worth 0."""
        advantages = torch.zeros_like(rewards)
        following = torch.zeros_like(rewards[:, 0])
        next_value = torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            delta = rewards[:, t] + self.gamma * next_value - values[:, t]
            following = torch.where(mask[:, t], delta + self.gamma * self.lam * following, following)
            next_value = torch.where(mask[:, t], values[:, t], next_value)
            advantages[:, t] = torch.where(mask[:, t], following, 0.0)
        return AdvantagesAndReturns(advantages, torch.where(mask, advantages + values, torch.zeros_like(values)))


@dataclass(frozen=True, kw_only=True)
class RewardToGo(AdvantageEstimator):
    """Âₜ = Σ_{t' ≥ t} γ^(t'−t)·rₜ', with no value network (REINFORCE++; Hu 2025): GAE at V = 0 and λ = 1.

    REINFORCE++ is this inside `Whitened`: normalized over the rollout of all processes, not per prompt.
    """

    gamma: float = 1.0
    """Discount, in [0, 1]."""

    def __post_init__(self) -> None:
        check_unit_interval(gamma=self.gamma)

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Compute the discounted sum of the rewards from each action on."""
        plain = GAE(gamma=self.gamma, lam=1.0)
        return plain(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=all_sum)


@dataclass(frozen=True, kw_only=True)
class Whitened(AdvantageEstimator):
    """Another estimator's advantages at mean 0 and variance 1 over the rollout of all processes.

    The β of a KL in the loss is then in standard deviations of the advantage (`KLInLoss`).
    """

    estimator: AdvantageEstimator = field(default_factory=GAE)
    """Estimator whose advantages are whitened; its returns stay as they are."""

    @property
    def needs_value(self) -> bool:
        """True if the inner estimator needs a value network."""
        return self.estimator.needs_value

    @property
    def needs_group(self) -> bool:
        """True if the inner estimator compares several responses to one prompt."""
        return self.estimator.needs_group

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Compute (Â − mean) / √(var + 1e-8)."""
        credit = self.estimator(rewards, values, mask, groups=groups, all_sum=all_sum)
        return credit._replace(advantages=whiten(credit.advantages, mask, all_sum=all_sum))

    def adapted(self, mean: float) -> Self:
        """Return the estimator with the inner estimator of the next rollout."""
        return replace(self, estimator=self.estimator.adapted(mean))
