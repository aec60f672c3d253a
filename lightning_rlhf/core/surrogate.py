"""Surrogates that an update optimizes on advantages at π_old: the interface and the plain ρÂ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.kl import held
from lightning_rlhf.core.level import ActionLevel


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


class SamplerWeights(NamedTuple):
    """Weights that correct for the sampler, with what they were made of.

    Attributes:
        applied: what the loss of each action is multiplied with, (B, T), ≥ 0; (B, 1) where one weight is for all tokens
            of a response.
        ratio: w = π_old / π_sampler before the correction, of the same shape, ≥ 0 and at most e⁴⁰.
        changed: 1 where the correction made another weight of w, else 0, of the same shape.
    """

    applied: Tensor
    ratio: Tensor
    changed: Tensor

    def stats(self, actions: Tensor) -> dict[str, Tensor]:
        """Return what to log of each action, by logged name, (B, T) each.

        The square of w is float64: in float32 a sum of squares near e⁸⁰ overflows.

        Args:
            actions: any number of each action, (B, T).
        """
        parts = {
            "policy/sampler_ratio": self.ratio,
            "policy/sampler_ratio_square": self.ratio.double().square(),
            "policy/sampler_weight": self.applied,
            "policy/sampler_truncated": self.changed,
        }
        return {name: part.expand_as(actions) for name, part in parts.items()}


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

    def weights(
        self, logprobs: Tensor, sampler_logprobs: Tensor, response: Tensor, level: ActionLevel
    ) -> SamplerWeights:
        """Weights of the actions' losses: 1 unless a class corrects for the sampler.

        Args:
            logprobs: log π_old per token, (B, R), nats: the trainer's forward pass.
            sampler_logprobs: the same under the engine, weights and precision that drew the tokens, (B, R), nats.
            response: (B, R), bool.
            level: what an action is.
        """
        ratio = importance_ratio(level.total(logprobs - sampler_logprobs, response))
        return SamplerWeights(torch.ones_like(ratio), ratio, torch.zeros_like(ratio))

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
