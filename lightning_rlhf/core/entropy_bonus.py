"""Entropy bonus of the policy loss: a fixed price or one that holds a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.checks import check_finite, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Adaptive):
    """Bonus coef·H(π_θ) on the next-token distributions of an action (Williams & Peng 1991; Mnih et al. 2016, A3C).

    H is summed over the vocabulary, exactly, at the states that π_old reached, so that the gradient is that of the
    entropy of those distributions and not of which states are reached. Each action's loss has it: a token's own
    entropy, or the sum over the response, before the reduction.
    """

    coef: float = 0.01
    """Reward units per nat, > 0."""

    def __post_init__(self) -> None:
        check_positive(coef=self.coef)

    @property
    def price(self) -> float:
        """Coefficient in force."""
        return self.coef

    def adapted(self, entropy: float) -> Self:
        """Return the bonus of the next rollout.

        Args:
            entropy: mean of a rollout's next-token distributions, over all processes, nats.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy(EntropyBonus):
    """Bonus whose price rises while the entropy is at or below a target, and falls and is not charged above it.

    (He et al. 2025, 2505.22312, Skywork-OR1; TRL's `use_adaptive_entropy`, there after every optimizer step, here after
    every rollout.) coef ← clip(coef ± step, smallest, largest).
    """

    coef: float = 0.0
    """Price at the start, ≥ 0."""
    target: float = 0.2
    """Entropy to hold, nats per token, > 0."""
    step: float = 0.005
    """Change of the price, > 0."""
    smallest: float = 0.0
    """Lower bound of the price, ≥ 0: from there it rises again."""
    largest: float = 1.0
    """Upper bound of the price, above `smallest`."""
    entropy: float = math.inf
    """Entropy of the last rollout, nats per token; infinite before the first, so that nothing is charged."""

    def __post_init__(self) -> None:
        check_not_negative(coef=self.coef, smallest=self.smallest)
        check_positive(target=self.target, step=self.step, largest=self.largest)
        if self.smallest >= self.largest:
            raise ValueError(f"`smallest` must be below `largest`: got {self.smallest} and {self.largest}")

    @property
    def price(self) -> float:
        """Coefficient in force: 0 above the target."""
        return self.coef if self.entropy <= self.target else 0.0

    def moving(self) -> tuple[str, ...]:
        """Names of the price and the last entropy."""
        return ("coef", "entropy")

    def adapted(self, entropy: float) -> Self:
        """Return the bonus after one more rollout.

        Raises:
            ValueError: `entropy` is not finite.
        """
        check_finite(entropy=entropy)
        change = self.step if entropy <= self.target else -self.step
        return replace(self, coef=min(max(self.coef + change, self.smallest), self.largest), entropy=entropy)
