"""What a response earns that hit the length limit before its end token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative


@dataclass(frozen=True, kw_only=True)
class MissingEOS(ABC):
    """A rule for the score of a response without end token."""

    @abstractmethod
    def __call__(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scores after the rule.

        Args:
            scores: r_φ(x, y), (B,), float.
            ended: the response closed with an end token, (B,), bool.

        Returns:
            (B,), the scores of ended responses unchanged.
        """


@dataclass(frozen=True, kw_only=True)
class ReplaceScore(MissingEOS):
    """The score becomes a fixed value (Ziegler et al. 2019, code; Huang et al. 2024, detail 23)."""

    value: float = -1.0
    """Reward units, after normalisation of the reward."""

    def __call__(self, scores: Tensor, ended: Tensor) -> Tensor:
        """`value` where the response did not end."""
        return torch.where(ended, scores, torch.full_like(scores, self.value))


@dataclass(frozen=True, kw_only=True)
class SubtractFromScore(MissingEOS):
    """The score is lowered by a penalty (TRL's `missing_eos_penalty`)."""

    penalty: float = 1.0
    """Reward units, ≥ 0; with 0 the score stands as it is."""

    def __post_init__(self) -> None:
        check_not_negative(penalty=self.penalty)

    def __call__(self, scores: Tensor, ended: Tensor) -> Tensor:
        """score − `penalty` where the response did not end."""
        return torch.where(ended, scores, scores - self.penalty)
