"""Learning a reward from rankings of K responses to one prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def preferred_pairs(rank: Tensor) -> Tensor:
    """Which pairs (i, j) of a prompt's responses say "i is preferred to j".

    Args:
        rank: (B, K), int64, 0 best, -1 absent. Equal ranks are ties and give no pair.

    Returns:
        (B, K, K), bool.
    """
    return (rank.unsqueeze(2) < rank.unsqueeze(1)) & (rank >= 0).unsqueeze(2)


def score_margins(scores: Tensor) -> Tensor:
    """r_i − r_j of every pair of a prompt's responses.

    Args:
        scores: (B, K).

    Returns:
        (B, K, K).
    """
    return scores.unsqueeze(2) - scores.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(ABC):
    """Loss of the scores of K ranked responses, one element per prompt."""

    @abstractmethod
    def __call__(self, scores: Tensor, rank: Tensor) -> Tensor:
        """The loss of each prompt.

        Args:
            scores: r_θ(x, y_k), (B, K); what stands at absent responses has no influence.
            rank: (B, K), int64, 0 best, equal = tie, -1 absent.

        Returns:
            (B,), nats; 0 for a prompt without any pair.
        """


@dataclass(frozen=True, kw_only=True)
class RankingLoss(PreferenceLoss):
    """−1/C(K,2) Σ log σ(r_w − r_l) over all pairs of a prompt (Ouyang et al. 2022, eq. 1).

    All pairs of a prompt are one element: K forward passes, and no response is seen K − 1 times per epoch. Tied pairs
    are dropped and the sum divided by the pairs that are left; K may differ from prompt to prompt.
    """

    def __call__(self, scores: Tensor, rank: Tensor) -> Tensor:
        """Mean over the prompt's pairs.

        Raises:
            ValueError: the shapes differ.
        """
        if scores.shape != rank.shape:
            raise ValueError(f"`rank` must have the shape of `scores`, {tuple(scores.shape)}: got {tuple(rank.shape)}")
        pairs = preferred_pairs(rank)
        margins = torch.where(pairs, score_margins(scores), torch.zeros_like(scores).unsqueeze(2))
        losses = torch.where(pairs, -logsigmoid(margins), torch.zeros_like(margins))
        return losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
