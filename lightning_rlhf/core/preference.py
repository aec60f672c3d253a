"""Losses of a reward model on rankings of K responses to one prompt."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_not_negative


def preferred_pairs(rank: Tensor) -> Tensor:
    """Mask of the pairs (i, j) of a prompt's responses with i preferred to j.

    Args:
        rank: (B, K), int64, 0 best, -1 absent. Equal ranks are ties and give no pair.

    Returns:
        (B, K, K), bool.
    """
    return (rank.unsqueeze(2) < rank.unsqueeze(1)) & (rank >= 0).unsqueeze(2)


def score_margins(scores: Tensor) -> Tensor:
    """Differences r_i − r_j of every pair of a prompt's responses.

    Args:
        scores: (B, K).

    Returns:
        (B, K, K).
    """
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _check_shape(name: str, found: Tensor, scores: Tensor) -> None:
    if found.shape != scores.shape:
        raise ValueError(f"`{name}` must have the shape of `scores`, {tuple(scores.shape)}: got {tuple(found.shape)}")


def _pair_mean(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean of (B, K, K) over each prompt's pairs, (B,); 0 for a prompt without any."""
    return torch.where(pairs, values, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(ABC):
    """Base class of losses of K ranked responses, with one element per prompt."""

    @abstractmethod
    def __call__(self, scores: Tensor, rank: Tensor, strength: Tensor | None = None) -> Tensor:
        """Compute the loss of each prompt.

        Args:
            scores: r_θ(x, y_k), (B, K); what stands at absent responses has no influence.
            rank: (B, K), int64, 0 best, equal = tie, -1 absent.
            strength: s_k, the labeler's rating of each response, (B, K), higher is better, NaN where there is none.

        Returns:
            (B,), nats; 0 for a prompt without any pair.

        Raises:
            ValueError: the shapes differ, or the loss needs a rating that is not there.
        """


@dataclass(frozen=True, kw_only=True)
class RankingLoss(PreferenceLoss):
    """Loss −1/C(K,2) Σ log σ(r_w − r_l − m·(s_w − s_l)) (Ouyang et al. 2022, eq. 1, at m = 0).

    All pairs of a prompt are one element: K forward passes, and no response is seen K − 1 times per epoch. Tied pairs
    are dropped and the sum divided by the pairs that are left; K may differ from prompt to prompt. The margin asks for
    a score difference that grows with how much better the labeler found y_w (Touvron et al. 2023, §3.2.2).

    Args:
        margin: m ≥ 0, score per unit of rating; above 0 every response of a pair needs a rating.

    Raises:
        ValueError: `margin` is negative or not finite.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(margin=self.margin)

    def __call__(self, scores: Tensor, rank: Tensor, strength: Tensor | None = None) -> Tensor:
        """Average over the prompt's pairs; without a margin `strength` is not read."""
        _check_shape("rank", rank, scores)
        pairs, margins = preferred_pairs(rank), score_margins(scores)
        if self.margin > 0:
            margins = margins - self.margin * self._gaps(scores, pairs, strength)
        return _pair_mean(-logsigmoid(torch.where(pairs, margins, 0.0)), pairs)

    def _gaps(self, scores: Tensor, pairs: Tensor, strength: Tensor | None) -> Tensor:
        """Rating gaps s_i − s_j, (B, K, K), required wherever there is a pair."""
        strength = torch.full_like(scores, math.nan) if strength is None else strength.to(scores.dtype)
        _check_shape("strength", strength, scores)
        gaps = score_margins(strength)
        unknown = int((pairs & ~gaps.isfinite()).sum())
        if unknown:
            raise ValueError(
                f"`margin={self.margin}` needs the ratings of both responses of every pair: got none, or one that is "
                f"not finite, for {unknown} of {int(pairs.sum())} pairs; give the rows `scores` (or pairs a `margin`), "
                "or set `margin=0.0`"
            )
        return gaps


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(PreferenceLoss):
    """−1/S Σ_k log( e^{r_k} / (e^{r_k} + Σ_{j below k} e^{r_j}) ), the ranking drawn best first (Plackett 1975).

    Each of the S responses with another ranked below it is one draw, from itself and all below; a ranking without ties
    has S = K − 1. Dividing by S makes K = 2 equal eq. 1 of Ouyang et al. 2022, and the gradient of the best of K
    responses of equal score is −1/K in both. Tied responses do not compete with each other: each is drawn from itself
    and what is strictly below, so that a tie says nothing, as in `RankingLoss`.
    """

    def __call__(self, scores: Tensor, rank: Tensor, strength: Tensor | None = None) -> Tensor:
        """Average over the prompt's draws; `strength` is not read."""
        _check_shape("rank", rank, scores)
        pairs = preferred_pairs(rank)
        below = torch.where(pairs, -score_margins(scores), -math.inf)
        draws = pad(below, (0, 1)).logsumexp(2)  # the column of zeros is r_k − r_k
        return draws.sum(1) / pairs.any(2).sum(1).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Centered(PreferenceLoss):
    """Another loss plus η·(r_w + r_l)², averaged over the prompt's pairs (Eisenstein et al. 2023).

    Preferences leave a constant per prompt free; this fixes it, so that scores of different prompts can be compared.

    Args:
        loss: what it is added to.
        coef: η ≥ 0.

    Raises:
        ValueError: `coef` is negative or not finite.
    """

    loss: PreferenceLoss = RankingLoss()
    coef: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        check_not_negative(coef=self.coef)

    def __call__(self, scores: Tensor, rank: Tensor, strength: Tensor | None = None) -> Tensor:
        """Compute `loss` plus the centering term."""
        losses, pairs = self.loss(scores, rank, strength), preferred_pairs(rank)
        sums = torch.where(pairs, scores.unsqueeze(2) + scores.unsqueeze(1), 0.0)
        return losses + self.coef * _pair_mean(sums.square(), pairs)
