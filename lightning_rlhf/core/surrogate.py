"""PPO's surrogates: how far an update may follow advantages that were measured at π_old."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.checks import check_not_negative, check_positive
from lightning_rlhf.core.kl import k3

LARGEST_LOG_RATIO = 40.0
"""Above it a ratio is held, so that neither it, its square nor a clipped gradient overflows float32."""
PENALTY_BOUNDS = (1e-6, 1e6)
"""Between them an adaptive penalty moves: halving for ever would end at 0, which no doubling leaves."""


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """ρ = π_θ(a|s) / π_old(a|s), held at e⁴⁰.

    Args:
        log_ratio: log π_θ − log π_old, any shape, nats.

    Returns:
        the same shape, > 0 and finite.
    """
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


class PerAction(NamedTuple):
    """A loss before it is reduced.

    Attributes:
        loss: to be minimised, (B, T).
        stats: what to log of each action, by logged name, (B, T) each.
    """

    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Surrogate(Adaptive, ABC):
    """Per-action policy loss. It sees no mask and no reduction: those are applied once, outside."""

    @property
    def adaptive(self) -> bool:
        """Whether `adapted` wants KL(π_old‖π_θ), which costs one more evaluation of the rollout."""
        return False

    @abstractmethod
    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """The loss of each action.

        Args:
            log_ratio: log π_θ(a|s) − log π_old(a|s), (B, T), nats; the gradient flows through it.
            advantages: Â, (B, T), no gradient.
        """

    def adapted(self, kl_old: float) -> Self:
        """The surrogate of the next rollout.

        Args:
            kl_old: KL(π_old‖π_θ) after the update, mean per action over all processes, nats.

        Returns:
            the successor; itself unless the class adapts.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class Clip(Surrogate):
    """−min(ρÂ, clip(ρ, 1 − ε, 1 + ε)Â) (PPO eq. 7).

    With one action per response ρ is the product of the token ratios and reaches the bounds sooner than a token's.
    """

    epsilon: float = 0.2
    """ε > 0."""

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """The pessimistic bound; an action is clipped where the bound has no gradient."""
        ratio = importance_ratio(log_ratio)
        plain = -ratio * advantages
        bounded = -ratio.clamp(1 - self.epsilon, 1 + self.epsilon) * advantages
        return PerAction(torch.maximum(plain, bounded), {"policy/clipfrac_avg": (bounded > plain).to(plain.dtype)})


@dataclass(frozen=True, kw_only=True)
class KLPenalty(Surrogate):
    """−ρÂ + b·KL(π_old‖π_θ), the penalty adapted to a target (PPO eq. 8 and §4).

    The KL is to the *old* policy: 0 with gradient 0 at the start of every update and re-centred at each rollout, so
    it does not move the optimum and does not repeat the KL to SFT in the reward. It is estimated by k3 = ρ − 1 − log ρ
    at the sampled action, whose gradient in expectation is that of the KL.

    After the update, d = KL(π_old‖π_θ):  d < target/1.5 → b/2;  d > 1.5·target → 2b.
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
        """True where there is a target."""
        return self.target is not None

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """−ρÂ + b·k3."""
        kl_old = k3(-log_ratio.clamp(max=LARGEST_LOG_RATIO))
        return PerAction(
            -importance_ratio(log_ratio) * advantages + self.coef * kl_old,
            {"policy/kl_penalty": self.coef * kl_old.detach()},
        )

    def state(self) -> dict[str, float]:
        """The penalty coefficient b where it adapts."""
        return {} if self.target is None else {"coef": self.coef}

    def adapted(self, kl_old: float) -> Self:
        """b halved, doubled or kept, within `PENALTY_BOUNDS`.

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
