"""Surrogates that an update optimizes on advantages at π_old: the interface and the plain ρÂ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.kl import held


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """Ratio ρ = π_θ(a|s) / π_old(a|s), capped at e⁴⁰.

    Args:
        log_ratio: log π_θ − log π_old, any shape, nats.

    Returns:
        the same shape, > 0 and finite.
    """
    return held(log_ratio).exp()


class PerAction(NamedTuple):
    """Loss per action before the reduction, with numbers to log.

    Attributes:
        loss: to be minimized, (B, T).
        stats: what to log of each action, by logged name, (B, T) each.
    """

    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Surrogate(Adaptive, ABC):
    """Per-action policy loss. It sees no mask and no reduction: those are applied once, outside."""

    @property
    def adaptive(self) -> bool:
        """True if `adapted` needs KL(π_old‖π_θ), which costs one more evaluation of the rollout."""
        return False

    @abstractmethod
    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute the loss of each action.

        Args:
            log_ratio: log π_θ(a|s) − log π_old(a|s), (B, T), nats; the gradient flows through it.
            advantages: Â, (B, T), no gradient.
        """

    def weights(self, mismatch: Tensor) -> Tensor:
        """Weights of the actions' losses, (B, T): 1 unless a class corrects for the sampler.

        Args:
            mismatch: log π_old − log π_sampler of each action, (B, T), nats: the trainer's forward pass against the
                weights, and the precision, that drew the tokens.
        """
        return torch.ones_like(mismatch)

    def adapted(self, kl_old: float) -> Self:
        """Return the surrogate of the next rollout.

        Args:
            kl_old: KL(π_old‖π_θ) after the update, mean per action over all processes, nats.

        Returns:
            the successor; itself unless the class adapts.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class ImportanceSampling(Surrogate):
    """Plain importance-sampling surrogate −ρÂ (PPO eq. 6, "conservative policy iteration").

    At π_old its gradient is REINFORCE's. E_old[ρÂ] exceeds J by β·KL(π_θ‖π_old), so many steps on one rollout diverge:
    take it with one inner epoch, or with a small learning rate.
    """

    def __call__(self, log_ratio: Tensor, advantages: Tensor) -> PerAction:
        """Compute −ρÂ for each action."""
        return PerAction(-importance_ratio(log_ratio) * advantages, {})
