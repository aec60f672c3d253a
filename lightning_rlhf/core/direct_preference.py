"""Losses of a policy on preferences without a reward model: DPO, IPO and KTO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_rlhf.core.checks import check_not_negative, check_positive
from lightning_rlhf.core.preference import preferred_pairs, score_margins


def response_labels(rank: Tensor) -> Tensor:
    """Label good responses 1 and bad ones −1, (B, K) int64; 0 does not count.

    The best of several responses are good, the worst bad, and a prompt whose responses are all tied has neither. A
    response without others (K = 1) is good at rank 0 and bad at any other.

    Args:
        rank: (B, K), int64, 0 best, equal = tie, -1 absent.
    """
    worst = rank.amax(1, keepdim=True)
    present = rank >= 0
    if rank.shape[1] == 1:
        return torch.where(present, torch.where(rank == 0, 1, -1), 0)
    counts = present & (worst > 0)
    return torch.where(counts & (rank == 0), 1, 0) - torch.where(counts & (rank == worst), 1, 0)


@dataclass(frozen=True, kw_only=True)
class DirectPreferenceLoss(ABC):
    """Base class of losses on log-ratios h = log π_θ(y∣x) − log π_ref(y∣x) of whole responses.

    β·h is the implicit reward: up to a constant per prompt, the reward under which π_θ maximizes E[r] − β·KL(π‖π_ref)
    (Rafailov et al. 2023, eq. 5).

    Args:
        beta: β > 0, reward units per nat.

    Raises:
        ValueError: `beta` is not above 0.
    """

    beta: float = 0.1
    needs_kl = False
    """True if the loss reads `kl`."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def counts(self, rank: Tensor) -> Tensor:
        """Return the prompts whose loss counts, (B,), bool: those with a pair.

        Args:
            rank: (B, K), int64, 0 best, equal = tie, -1 absent.

        Raises:
            ValueError: the rows hold one response each, of which no two can be compared.
        """
        if rank.shape[1] < 2:
            raise ValueError(
                f"{type(self).__name__} compares the responses to a prompt: got one response each; give it rankings "
                "(`ComparisonDataModule`), or set `loss=KTO()`, which learns from labels"
            )
        return preferred_pairs(rank).any(2).any(1)

    @abstractmethod
    def __call__(self, log_ratios: Tensor, rank: Tensor, kl: Tensor | None = None) -> Tensor:
        """Compute the loss of each prompt.

        Args:
            log_ratios: h of each response, (B, K), nats; what stands at absent responses has no influence.
            rank: (B, K), int64, 0 best, equal = tie, -1 absent.
            kl: estimate of KL(π_θ‖π_ref), scalar, nats, without gradient; for losses with `needs_kl`.

        Returns:
            (B,); 0 for a prompt that does not count.
        """


class PairLoss(DirectPreferenceLoss):
    """Base class of losses of h_w − h_l, averaged over the pairs of a prompt's ranking as in `RankingLoss`."""

    def __call__(self, log_ratios: Tensor, rank: Tensor, kl: Tensor | None = None) -> Tensor:
        """Average over the prompt's pairs; `kl` is not read."""
        pairs = preferred_pairs(rank)
        losses = self.of_margins(torch.where(pairs, score_margins(log_ratios), 0.0))
        return torch.where(pairs, losses, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

    @abstractmethod
    def of_margins(self, margins: Tensor) -> Tensor:
        """Compute the loss of each h_w − h_l, any shape."""


@dataclass(frozen=True, kw_only=True)
class DPO(PairLoss):
    """Loss −(1 − ε)·log σ(β(h_w − h_l)) − ε·log σ(−β(h_w − h_l)) (Rafailov et al. 2023, eq. 7, at ε = 0).

    The logistic loss of a reward model whose reward is β·h. ε > 0 takes every preference for wrong with that
    probability (Mitchell 2023, conservative DPO): the loss is then smallest where σ(β(h_w − h_l)) = 1 − ε, not at
    infinity.

    Args:
        beta: β > 0, reward units per nat.
        label_smoothing: ε, 0 ≤ ε < ½.

    Raises:
        ValueError: `beta` is not above 0, or `label_smoothing` is out of range.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"`label_smoothing` is the share of wrong preferences, from 0 to below 0.5: got {self.label_smoothing}"
            )

    def of_margins(self, margins: Tensor) -> Tensor:
        """Compute the loss in nats."""
        margins, wrong = self.beta * margins, self.label_smoothing
        return -(1 - wrong) * logsigmoid(margins) - wrong * logsigmoid(-margins)


@dataclass(frozen=True, kw_only=True)
class IPO(PairLoss):
    """Loss (h_w − h_l − 1/(2β))² (Azar et al. 2023, eq. 17, whose τ is β).

    h is of whole responses, a sum over tokens, as the paper has it. TRL divides each h by its response's length first,
    so that its β is per token: another loss.
    """

    def of_margins(self, margins: Tensor) -> Tensor:
        """Compute the loss in nats²."""
        return (margins - 1 / (2 * self.beta)).square()


@dataclass(frozen=True, kw_only=True)
class KTO(DirectPreferenceLoss):
    """Loss λ_D·σ(−β(h − z)) of a good response and λ_U·σ(β(h − z)) of a bad one (Ethayarajh et al. 2024, §4.1).

    z = max(0, KL(π_θ‖π_ref)) is estimated from responses to other prompts of the whole batch and has no gradient.
    Labels are those of `response_labels`, and a prompt's loss is the mean over its responses that count.

    Args:
        beta: β > 0, reward units per nat.
        desirable: λ_D ≥ 0, weight of good responses. With many more of one kind than of the other, the paper wants
            λ_D times the good over λ_U times the bad to lie in [1, 4/3].
        undesirable: λ_U ≥ 0, weight of bad responses.

    Raises:
        ValueError: `beta` is not above 0, or a weight is negative.
    """

    needs_kl = True
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(desirable=self.desirable, undesirable=self.undesirable)

    def counts(self, rank: Tensor) -> Tensor:
        """Return the prompts with a good or a bad response, (B,), bool."""
        return (response_labels(rank) != 0).any(1)

    def __call__(self, log_ratios: Tensor, rank: Tensor, kl: Tensor | None = None) -> Tensor:
        """Average over the prompt's responses that count.

        Raises:
            ValueError: `kl` is missing.
        """
        if kl is None:
            raise ValueError("KTO needs `kl`, the mean log-ratio of mismatched prompts and responses: got None")
        labels = response_labels(rank)
        values = labels * (self.beta * (torch.where(labels != 0, log_ratios, 0.0) - kl.clamp(min=0)))
        losses = (-values).sigmoid()
        losses = torch.where(labels > 0, self.desirable * losses, self.undesirable * losses)
        return torch.where(labels != 0, losses, 0.0).sum(1) / (labels != 0).sum(1).clamp(min=1)
