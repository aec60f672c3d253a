"""Best-of-n, a baseline without training: the highest score among n responses of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative, check_positive


def best_of_n_kl(n: int) -> float:
    """KL(π_bon‖π_ref) = log n − (n − 1)/n in nats; an upper bound if scores tie (Beirami et al. 2024).

    Args:
        n: how many are drawn, ≥ 1.

    Raises:
        ValueError: n is below 1.
    """
    check_positive(n=n)
    return math.log(n) - (n - 1) / n


def n_of_kl(kl: float) -> float:
    """Return the real n ≥ 1 with log n − (n − 1)/n = kl, whose best-of-n is as far from the reference.

    Args:
        kl: nats, ≥ 0.

    Raises:
        ValueError: `kl` is negative or not finite.
    """
    check_not_negative(kl=kl)
    low, high = 0.0, kl + 1.0  # of log n: log n − 1 + 1/n ≥ log n − 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle + math.expm1(-middle) < kl else (low, middle)
    return math.exp((low + high) / 2)


def expected_best(scores: Tensor, *, n: int) -> Tensor:
    """Unbiased mean score of best-of-n: E[max of n of the N scores, drawn without replacement].

    Σ_i C(i − 1, n − 1)/C(N, n)·s₍ᵢ₎ over the scores in ascending order; the mean for n = 1, the maximum for n = N.
    Of scores pooled over prompts it is an upper bound of the mean over prompts of each one's best of n: E[max] is
    concave in the distribution (1 − Fⁿ is), and the pool is a mixture.

    Args:
        scores: of N independent responses to each prompt, (B, N), reward units.
        n: how many of them are drawn, 1 ≤ n ≤ N.

    Returns:
        (B,), reward units.

    Raises:
        ValueError: n is below 1 or above N.
    """
    count = scores.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"`n` must lie between 1 and the {count} scores of each prompt: got {n}")
    place = torch.arange(n, count + 1, dtype=torch.float64)
    # in logarithms: 3,000 choose 1,500 is beyond float64, and a whole number of that length costs as much as its digits
    chosen = place.lgamma() - math.lgamma(n) - (place - n + 1).lgamma()
    weights = chosen.softmax(0)  # C(N, n) is their sum
    return scores.sort(-1).values[..., n - 1 :] @ weights.to(scores)
