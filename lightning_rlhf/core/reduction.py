"""Reductions of per-action losses to one number, with the denominator of the whole optimizer step.

A step's loss is Σ `total` / Σ `count`, both over every microbatch and process of the step: so microbatches and
processes of unequal lengths change nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from lightning_rlhf.core.checks import check_positive
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

    def for_length(self, max_new_tokens: int) -> Self:
        """Return the reduction with the longest response (in tokens) filled in if it needs one."""
        return self

    @abstractmethod
    def count(self, mask: Tensor) -> Tensor:
        """Denominator of the same rows, an int64 scalar."""


@dataclass(frozen=True, kw_only=True)
class TokenMean(Reduction):
    """Mean over actions of equal weight: Σ loss / number of actions."""

    def count(self, mask: Tensor) -> Tensor:
        """Number of actions that count."""
        return mask.sum()


@dataclass(frozen=True, kw_only=True)
class SeqMeanTokenSum(Reduction):
    """Mean over responses of their *sums*: Σ loss / number of responses.

    At token level the only reduction, up to a constant, that is ∇J.
    """

    def count(self, mask: Tensor) -> Tensor:
        """Number of responses with an action that counts."""
        return mask.any(1).sum()


@dataclass(frozen=True, kw_only=True)
class SeqMeanTokenMean(Reduction):
    """Mean over responses of their *means*: Σ (Σ_t loss / |y|) / number of responses (GRPO, eq. 3).

    (Shao et al. 2024.) A token of a long response weighs less, so at token level it is not ∇J where lengths vary
    (Liu et al. 2025, §3.1).
    """

    def total(self, losses: Tensor, mask: Tensor) -> Tensor:
        """Sum over responses of the mean over their actions."""
        return masked_sum(losses / mask.sum(1, keepdim=True).clamp(min=1), mask)

    def count(self, mask: Tensor) -> Tensor:
        """Number of responses with an action that counts."""
        return mask.any(1).sum()


@dataclass(frozen=True, kw_only=True)
class SeqMeanTokenSumNorm(Reduction):
    """Mean over responses of sums by one constant: Σ loss / (length · responses) (Dr. GRPO, §3.2).

    (Liu et al. 2025.) ∇J up to the constant, at the size of a mean over tokens.
    """

    length: int | None = None
    """Tokens, > 0; None is the generation's `max_new_tokens`, the paper's choice."""

    def __post_init__(self) -> None:
        if self.length is not None:
            check_positive(length=self.length)

    def for_length(self, max_new_tokens: int) -> Self:
        """Return the reduction with `length` in tokens."""
        return replace(self, length=max_new_tokens if self.length is None else self.length)

    def total(self, losses: Tensor, mask: Tensor) -> Tensor:
        """Sum over actions divided by the length.

        Raises:
            ValueError: `length` is still None.
        """
        if self.length is None:
            raise ValueError("`SeqMeanTokenSumNorm` needs `length`, in tokens: set it, or call `for_length` first")
        return masked_sum(losses, mask) / self.length

    def count(self, mask: Tensor) -> Tensor:
        """Number of responses with an action that counts."""
        return mask.any(1).sum()
