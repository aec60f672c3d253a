"""Length bias of a reward model: how far its scores follow response length (Singhal et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.modules.metrics import Sums, binned

SIMILAR = 10
"""Largest difference in tokens at which two responses count as about as long."""
NAMES = ("shorter", "similar", "longer")


def longer_wins(longer: Tensor) -> Tensor:
    """Return 1 if the longer response of a pair is preferred, ½ for equal lengths; otherwise 0.

    Args:
        longer: length of the preferred response less that of the other, any shape.
    """
    return (longer.sign().double() + 1) / 2


class LengthAccuracy(Sums):
    """Accuracy by length difference: a model biased towards length fails on shorter preferred responses.

    longer and shorter by more than `SIMILAR` tokens, similar otherwise; the prompt cancels in the difference. A model
    has learned something beside length where its accuracy is above `longer_wins`, that of preferring the longer one.
    """

    def __init__(self) -> None:
        super().__init__(len(NAMES), 3)

    def update(self, margins: Tensor, longer: Tensor) -> None:
        """Add the pairs of a batch, N of them.

        Args:
            margins: r_w − r_l, (N,).
            longer: length of the preferred response less that of the other, (N,), int64, tokens.
        """
        bins = torch.bucketize(longer, longer.new_tensor([-SIMILAR, SIMILAR + 1]), right=True)
        self.sums += binned(bins, len(NAMES), margins > 0, longer_wins(longer))

    def compute(self) -> dict[str, Tensor]:
        """Return `longer_wins`, and the accuracy and number of pairs of each bin with a pair."""
        pairs, _, wins = self.sums.sum(0)
        values = {"longer_wins": wins / pairs}
        for name, (n, right, _) in zip(NAMES, self.sums, strict=True):
            if n:
                values |= {f"accuracy_{name}": right / n, f"pairs_{name}": n}
        return values


class LengthCorrelation(Sums):
    """Pearson correlation of score and length in tokens, over all responses and within prompts.

    ρ = (n Σrℓ − Σr Σℓ) / √((n Σr² − (Σr)²)(n Σℓ² − (Σℓ)²))

    Over all responses ℓ holds the prompt, and r a constant per prompt that preferences leave free; within prompts both
    are deviations from the mean of the prompt's responses, which takes these out.
    """

    def __init__(self) -> None:
        super().__init__(2, 6)

    def update(self, scores: Tensor, lengths: Tensor, present: Tensor) -> None:
        """Add the responses to a batch of B prompts.

        Args:
            scores: (B, K).
            lengths: of prompt + response + end token, (B, K), int64, tokens.
            present: responses that count, (B, K), bool.
        """
        both = torch.stack([scores.detach().double(), lengths.double()])
        means = torch.where(present, both, 0.0).sum(2, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        within = both - means
        self.sums += torch.stack([_moments(*pair[:, present]) for pair in (both, within)])

    def compute(self) -> dict[str, Tensor]:
        """Return `score_length_correlation` and `…_within_prompt`, each only if neither quantity is constant."""
        names = ("score_length_correlation", "score_length_correlation_within_prompt")
        values = {name: _pearson(*sums) for name, sums in zip(names, self.sums, strict=True)}
        return {name: value for name, value in values.items() if value.isfinite()}


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """Return the six sums (N, Σx, Σy, Σx², Σy², Σxy)."""
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).sum(1)


def _pearson(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Return Pearson's correlation; NaN if a variance is only rounding error."""
    spread = torch.stack([n * xx - x * x, n * yy - y * y])
    varies = spread > 1e-12 * n * torch.stack([xx, yy])
    correlation = (n * xy - x * y) / spread.clamp(min=0).prod().sqrt()
    return torch.where(varies.all(), correlation, torch.nan).clamp(-1, 1)
