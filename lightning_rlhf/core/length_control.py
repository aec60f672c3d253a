"""Win rate at equal lengths, which a judge's liking for long answers cannot raise."""

from __future__ import annotations

import torch
from torch import Tensor

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
