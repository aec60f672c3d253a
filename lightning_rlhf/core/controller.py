"""Controllers of β, the fixed or adaptive price of a nat of KL to the reference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.checks import check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class KLController(Adaptive, ABC):
    """Price β of E[r − β·log(π/π_ref)] (Ouyang et al. 2022, eq. 2), updated between rollouts."""

    coef: float = 0.02
    """β ≥ 0, reward units per nat. The default is the paper's (C.4)."""

    def __post_init__(self) -> None:
        check_not_negative(coef=self.coef)

    @abstractmethod
    def adapted(self, kl: float, episodes: int) -> Self:
        """Return β for the next rollout.

        Args:
            kl: mean over the rollout's episodes, of all processes, of Σ_t log π_old − log π_ref, nats.
            episodes: how many responses that mean is over.

        Returns:
            the successor; the object itself does not change.
        """


@dataclass(frozen=True, kw_only=True)
class FixedKL(KLController):
    """Constant β (Ouyang et al. 2022)."""

    def adapted(self, kl: float, episodes: int) -> Self:
        """Return the same β."""
        return self


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(KLController):
    """Controller that moves β towards a target KL, log-proportionally (Ziegler et al. 2019, §2.2).

    e = clip(KL/target − 1, −0.2, 0.2);  β ← β·(1 + e·episodes/horizon)
    """

    coef: float = 0.15
    """β at the start, > 0."""
    target: float = 6.0
    """KL to hold, nats per response."""
    horizon: float = 10_000.0
    """Episodes over which β may change by a factor of about e^0.2."""

    def __post_init__(self) -> None:
        check_positive(coef=self.coef, target=self.target, horizon=self.horizon)

    def moving(self) -> tuple[str, ...]:
        """Name of β, which moves."""
        return ("coef",)

    def adapted(self, kl: float, episodes: int) -> Self:
        """Return β·(1 + e·episodes/horizon): larger after a KL above the target, smaller below it.

        Raises:
            ValueError: the rollout is so large against `horizon` that β could fall to 0, or `kl` is NaN.
        """
        if math.isnan(kl):
            raise ValueError("the KL to the reference is not a number: the policy diverged; lower the learning rate")
        if episodes >= 5 * self.horizon:
            raise ValueError(f"`horizon` must exceed episodes/5: got {self.horizon} for {episodes} episodes")
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * episodes / self.horizon))
