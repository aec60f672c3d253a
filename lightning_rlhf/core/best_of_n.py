"""Best-of-n: the baseline that needs no training. Draw n responses of the reference, keep the one of highest score."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_positive


def best_of_n(probabilities: Tensor, scores: Tensor, *, n: int) -> Tensor:
    """π_bon(y), exactly, over a finite set of responses (Beirami et al. 2024).

    With F(y) the mass of scores ≤ r(y) and F⁻(y) that of scores < r(y), the best of n has the score of y with
    probability F(y)ⁿ − F⁻(y)ⁿ; responses that tie share it by their mass.

    Args:
        probabilities: π_ref of each response, (Y,), summing to 1.
        scores: r of each response, (Y,), reward units.
        n: how many are drawn, ≥ 1.

    Returns:
        (Y,), summing to 1; `probabilities` itself for n = 1.

    Raises:
        ValueError: n is below 1, or the shapes differ.
    """
    check_positive(n=n)
    if probabilities.shape != scores.shape or probabilities.dim() != 1:
        got = f"{tuple(probabilities.shape)} and {tuple(scores.shape)}"
        raise ValueError(f"`probabilities` and `scores` must both be (Y,): got {got}")
    worse = (scores.unsqueeze(0) < scores.unsqueeze(1)).to(probabilities.dtype)
    tied = (scores.unsqueeze(0) == scores.unsqueeze(1)).to(probabilities.dtype)
    below, level = worse @ probabilities, tied @ probabilities
    share = torch.where(level > 0, probabilities / level, torch.zeros_like(level))
    return share * ((below + level) ** n - below**n)


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n, nats: KL(π_bon‖π_ref) for scores without ties, an upper bound with them (Beirami et al. 2024).

    Args:
        n: how many are drawn, ≥ 1.

    Raises:
        ValueError: n is below 1.
    """
    check_positive(n=n)
    return math.log(n) - (n - 1) / n
