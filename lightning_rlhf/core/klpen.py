"""Surrogate KLPEN of PPO: a price on the distance from the old policy instead of a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative, check_positive
from lightning_rlhf.core.kl import k3
from lightning_rlhf.core.surrogate import PerAction, Surrogate, importance_ratio

PENALTY_BOUNDS = (1e-6, 1e6)
"""Bounds of an adaptive penalty. Otherwise halving for ever would end at 0, which no doubling leaves."""


@dataclass(frozen=True, kw_only=True)
class KLPen(Surrogate):
    """Surrogate −ρÂ + b·KL(π_old‖π_θ) with a penalty adapted to a target (PPO eq. 8 and §4).

    The KL is to the *old* policy: 0 with gradient 0 at the start of every update and re-centered at each rollout, so
    it does not move the optimum and does not repeat the KL to SFT in the reward. It is estimated by k3 = ρ − 1 − log ρ
    at the sampled action, whose gradient in expectation is that of the KL.

    After the update, d = KL(π_old‖π_θ):  d < target/1.5 → b/2;  d > 1.5·target → 2b. Where the learning rate falls to
    0, late updates stay below any target, and b ends at its lower bound; `target` None holds b.
    """

    coef: float = 1.0
    """b > 0 at the start, reward units per nat; 0 leaves the plain ρÂ (then `target` must be None)."""
    target: float | None = 0.01
    """d_targ, nats per action (a token, or the whole response at sequence level); None keeps b fixed."""

    def __post_init__(self) -> None:
        check_not_negative(coef=self.coef)
        if self.target is not None:
            check_positive(target=self.target)
            if self.coef == 0:
                raise ValueError("`coef`=0 can't adapt: doubling 0 gives 0; set `target` to None or `coef` above 0")

    @property
    def adaptive(self) -> bool:
        """True if there is a target."""
        return self.target is not None

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute −ρÂ + b·k3."""
        kl_old = k3(-log_ratio)
        return PerAction(
            -importance_ratio(log_ratio) * advantages + self.coef * kl_old,
            {"policy/kl_penalty": self.coef * kl_old.detach()},
        )

    def moving(self) -> tuple[str, ...]:
        """Name of the penalty coefficient b if it adapts."""
        return () if self.target is None else ("coef",)

    def adapted(self, kl_old: float) -> Self:
        """Halve, double or keep b within `PENALTY_BOUNDS`.

        Raises:
            ValueError: `kl_old` is not finite.
        """
        if self.target is None:
            return self
        if not math.isfinite(kl_old):
            raise ValueError(f"KL(π_old‖π_θ) after the update is {kl_old}: lower the learning rate or raise `coef`")
        factor = 0.5 if kl_old < self.target / 1.5 else 2.0 if kl_old > self.target * 1.5 else 1.0
        smallest, largest = PENALTY_BOUNDS
        return replace(self, coef=min(max(self.coef * factor, min(smallest, self.coef)), max(largest, self.coef)))
