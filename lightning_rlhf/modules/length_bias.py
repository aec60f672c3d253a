"""Whether a reward model scores answers or their lengths (Singhal et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.modules.metrics import Sums, binned

SIMILAR = 10
"""Tokens by which two responses may differ and count as about as long."""
NAMES = ("shorter", "similar", "longer")


def longer_wins(longer: Tensor) -> Tensor:
    """How often the longer response is the preferred one: 1, 0, or ½ for equal lengths.

    Args:
        longer: length of the preferred response less that of the other, any shape.
    """
    return (longer.sign().double() + 1) / 2


class LengthAccuracy(Sums):
    """Accuracy by how the preferred response's length compares: a model that likes length fails on the shorter.

    longer and shorter by more than `SIMILAR` tokens, similar otherwise; the prompt cancels in the difference. A model
    has learned something beside length where its accuracy is above `longer_wins`, that of preferring the longer one.
    """

    def __init__(self) -> None:
        super().__init__(len(NAMES), 3)

    def update(self, margins: Tensor, longer: Tensor) -> None:
        """Take in N pairs.

        Args:
            margins: r_w − r_l, (N,).
            longer: length of the preferred response less that of the other, (N,), int64, tokens.
        """
        bins = torch.bucketize(longer, longer.new_tensor([-SIMILAR, SIMILAR + 1]), right=True)
        self.sums += binned(bins, len(NAMES), margins > 0, longer_wins(longer))

    def compute(self) -> dict[str, Tensor]:
        """`longer_wins`, and per bin with a pair its accuracy and number of pairs."""
        pairs, _, wins = self.sums.sum(0)
        found = {"longer_wins": wins / pairs}
        for name, (n, right, _) in zip(NAMES, self.sums, strict=True):
            if n:
                found |= {f"accuracy_{name}": right / n, f"pairs_{name}": n}
        return found


class LengthCorrelation(Sums):
    """Pearson correlation of score and length in tokens, over all responses and within prompts.

    ρ = (n Σrℓ − Σr Σℓ) / √((n Σr² − (Σr)²)(n Σℓ² − (Σℓ)²))

    Over all responses ℓ holds the prompt, and r a constant per prompt that preferences leave free; within prompts both
    are deviations from the mean of the prompt's responses, which takes these out.
    """

    def __init__(self) -> None:
        super().__init__(2, 6)

    def update(self, scores: Tensor, lengths: Tensor, present: Tensor) -> None:
        """Take in B prompts.

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
        """`score_length_correlation` and `…_within_prompt`, each where neither score nor length is constant."""
        names = ("score_length_correlation", "score_length_correlation_within_prompt")
        found = {name: _pearson(*sums) for name, sums in zip(names, self.sums, strict=True)}
        return {name: value for name, value in found.items() if value.isfinite()}


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """N, Σx, Σy, Σx², Σy², Σxy."""
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).sum(1)


def _pearson(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """The correlation, NaN where a variance is nothing but rounding."""
    spread = torch.stack([n * xx - x * x, n * yy - y * y])
    varies = spread > 1e-12 * n * torch.stack([xx, yy])
    correlation = (n * xy - x * y) / spread.clamp(min=0).prod().sqrt()
    return torch.where(varies.all(), correlation, torch.nan).clamp(-1, 1)
