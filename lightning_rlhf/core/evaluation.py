"""Statistics of evaluations: standard errors, best-of-n and win rates at equal lengths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_not_negative, check_positive


def standard_error(values: Tensor) -> float:
    """Standard error s/√N of the mean of N numbers, s with Bessel's correction; NaN for fewer than 2.

    Args:
        values: (N,), one for each prompt: responses to one prompt are no independent draws.
    """
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_standard_error(totals: Tensor, counts: Tensor) -> float:
    """Standard error of ρ = Σ totals/Σ counts over N independent texts; NaN for fewer than 2.

    The counts are random, too.

    √(N/(N − 1)·Σ (total_i − ρ·count_i)²)/Σ counts, the delta method (Cochran 1977, §6.4).

    Args:
        totals: (N,), for example nats.
        counts: (N,), for example tokens, with a sum above 0.
    """
    totals = totals.double()
    counts = counts.double()
    n = len(totals)
    residuals = totals - totals.sum() / counts.sum() * counts
    return float(torch.sqrt(residuals.square().sum() * n / (n - 1)) / counts.sum()) if n > 1 else math.nan


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


STEPS = 100
"""Most Newton steps; a few are enough."""
HALVINGS = 40
"""Most halvings of a step that would not lower the loss."""


def length_controlled(preferences: Tensor, differences: Tensor, *, ridge: float = 1e-3) -> float:
    """Win rate σ(θ) at length difference 0, by logistic regression (Dubois et al. 2024, eq. 2).

    P(policy preferred) = σ(θ + φ·tanh(Δ/std(Δ))), fitted by the cross-entropy, which preferences between 0 and 1 enter
    as they are. Of the paper's three terms these are the model's quality and the length; the third, a difficulty of
    each instruction, needs many models' answers to the same instructions and is left out, and so is the paper's
    regularization towards models that were told to be brief or verbose. Where lengths do not tell winners from losers,
    φ = 0 and the result is the plain win rate; so it is where all differences are equal, and length can't be told from
    quality.

    Args:
        preferences: probability that the policy's response is the better one, (N,), in [0, 1]; ½ is a tie.
        differences: its length less that of the other response, (N,), in any unit.
        ridge: weight of ½·φ² beside the mean cross-entropy, > 0: it keeps φ finite where length alone decides.

    Returns:
        in [0, 1].

    Raises:
        ValueError: there is no pair, or the shapes differ.
    """
    if preferences.shape != differences.shape or preferences.dim() != 1 or len(preferences) == 0:
        got = f"{tuple(preferences.shape)} and {tuple(differences.shape)}"
        raise ValueError(f"`preferences` and `differences` must both be (N,) with N of at least 1: got {got}")
    wins, lengths = preferences.double(), differences.double()
    rate = float(wins.mean())
    if rate in (0.0, 1.0):
        return rate  # θ is infinite
    return float(fitted(wins, standardized(lengths), ridge=ridge)[0].sigmoid())


def standardized(differences: Tensor) -> Tensor:
    """Scale differences to tanh(Δ/std(Δ)), (N,), uncentered so that 0 stays 0.

    std is Bessel's; 1 if all differences are equal.
    """
    spread = differences.std() if len(differences) > 1 else differences.new_zeros(())
    return torch.tanh(differences / torch.where(spread > 0, spread, 1.0))


def fitted(wins: Tensor, x: Tensor, *, ridge: float) -> Tensor:
    """Fit (θ, φ) of σ(θ + φ·x) by Newton's method with halved steps.

    The minimum is that of the mean cross-entropy + ½·ridge·φ².

    Args:
        wins: (N,), in [0, 1], with a mean in between.
        x: (N,).
        ridge: > 0; θ has none, so that without an effect of x the fit repeats the mean of `wins`.
    """
    design = torch.stack([torch.ones_like(x), x], 1)
    penalty = torch.diag(design.new_tensor([0.0, ridge]))
    weights = design.new_tensor([float(wins.mean().logit()), 0.0])
    for _ in range(STEPS):
        chance = (design @ weights).sigmoid()
        gradient = design.T @ (chance - wins) / len(wins) + penalty @ weights
        curvature = (design * (chance * (1 - chance)).unsqueeze(1)).T @ design / len(wins) + penalty
        step = torch.linalg.solve(curvature, gradient)
        if float(gradient @ step) < 1e-20:  # twice what the loss can still fall
            break
        before = _loss(weights, design, wins, penalty)
        for _ in range(HALVINGS):
            if _loss(weights - step, design, wins, penalty) < before:
                break
            step = step / 2
        weights = weights - step
    return weights


def _loss(weights: Tensor, design: Tensor, wins: Tensor, penalty: Tensor) -> float:
    logits = design @ weights
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, wins)
    return float(entropy + 0.5 * weights @ penalty @ weights)
