"""From per-action losses to one number, with the denominator of the whole optimizer step.

A step's loss is Σ `total` / Σ `count`, both over every microbatch and process of the step: so microbatches and
processes of unequal lengths change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf.core.masked import masked_sum


@dataclass(frozen=True, kw_only=True)
class Reduction(ABC):
    """A weighted mean over the actions of an optimizer step."""

    def total(self, losses: Tensor, mask: Tensor) -> Tensor:
        """Numerator of some rows, scalar: Σ over actions.

        Args:
            losses: (b, T).
            mask: actions that count, (b, T), bool.
        """
        return masked_sum(losses, mask)

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """Denominator of the same rows, scalar, int64."""


@dataclass(frozen=True, kw_only=True)
class TokenMean(Reduction):
    """Every action weighs the same: Σ loss / number of actions."""

    def count(self, mask: Tensor) -> Tensor:
        """How many actions count."""
        return mask.sum()


@dataclass(frozen=True, kw_only=True)
class SequenceMean(Reduction):
    """Every response's *sum* weighs the same: Σ loss / number of responses.

    At token level the only reduction, up to a constant, that is ∇J.
    """

    def count(self, mask: Tensor) -> Tensor:
        """How many responses have an action that counts."""
        return mask.any(1).sum()
