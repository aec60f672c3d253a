"""Reward against √KL: the curve of Gao et al. (2022) through a run, and what best-of-n gets for the same KL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_rlhf.core import best_of_n_kl, expected_best

FEWEST = 5
"""Points for a fit of three numbers: fewer would be met by almost any curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GaoCurve:
    """R(d) = R₀ + d·(α − β·log d), d = √KL(π‖π_ref) (Gao et al. 2022, scaling laws of overoptimization).

    Attributes:
        start: R₀, reward units: their reward is 0 at the start, ours is not.
        alpha: α, reward units per √nat.
        beta: β, reward units per √nat; > 0 where the reward bends down.
        residual: root mean square distance of the points, reward units.
    """

    start: float
    alpha: float
    beta: float
    residual: float

    def __call__(self, d: float) -> float:
        """R(d), d ≥ 0."""
        return self.start if d == 0 else self.start + d * (self.alpha - self.beta * math.log(d))

    @property
    def peak(self) -> float | None:
        """d at which R is largest, e^(α/β − 1); None where R does not bend down, or where no one will get."""
        if self.beta <= 0 or self.alpha / self.beta > 50:
            return None
        return math.exp(self.alpha / self.beta - 1)


def fit_gao(d: Sequence[float], rewards: Sequence[float]) -> GaoCurve | None:
    """The curve of least squares, which is linear in (R₀, α, β).

    Args:
        d: √KL of each point, ≥ 0.
        rewards: of each point.

    Returns:
        the curve; None where there are fewer than `FEWEST` different d, or they do not tell the three numbers apart.
    """
    if len({round(x, 9) for x in d}) < FEWEST:
        return None
    x, y = torch.tensor(d, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    bend = torch.where(x > 0, -x * x.clamp(min=1e-300).log(), 0.0)
    design = torch.stack([torch.ones_like(x), x, bend], 1)
    found = torch.linalg.lstsq(design, y.unsqueeze(1), driver="gelsd")
    if int(found.rank) < design.shape[1]:
        return None
    start, alpha, beta = found.solution.flatten().tolist()
    residual = float((design @ found.solution - y.unsqueeze(1)).square().mean().sqrt())
    return GaoCurve(start=start, alpha=alpha, beta=beta, residual=residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """What keeping the best of n responses of the start would score, without any training.

    Attributes:
        d: √(log n − (n − 1)/n) for n = 1, 2, …: the KL of best-of-n is known exactly for scores without ties.
        rewards: E[max of n].
        largest: the n of the last point.
        pooled: whether n responses are drawn over all prompts, for want of several to one prompt: an upper bound.
    """

    d: tuple[float, ...]
    rewards: tuple[float, ...]
    largest: int
    pooled: bool


def best_of_start(rows: Sequence[Mapping[str, Any]]) -> BestOfN | None:
    """Best-of-n of the policy before training, up to as many n as there are responses.

    Args:
        rows: the first rollout or evaluation, with `prompt` and `score`.

    Returns:
        for n up to the fewest responses to a prompt where each has several; over all prompts otherwise; None for one
        response.
    """
    prompts: dict[str, list[float]] = {}
    for row in rows:
        prompts.setdefault(json.dumps(row.get("prompt")), []).append(row["score"])
    fewest = min(map(len, prompts.values()), default=0)
    groups = list(prompts.values()) if fewest > 1 else [[row["score"] for row in rows]]
    largest = min(map(len, groups))
    if largest < 2:
        return None
    chosen, scores = _spread(largest), [torch.tensor(group, dtype=torch.float64) for group in groups]
    means = [sum(float(expected_best(group, n=n)) for group in scores) / len(scores) for n in chosen]
    return BestOfN(
        d=tuple(math.sqrt(max(best_of_n_kl(n), 0.0)) for n in chosen),
        rewards=tuple(means),
        largest=largest,
        pooled=fewest <= 1,
    )


def _spread(largest: int, count: int = 60) -> list[int]:
    """About `count` whole numbers from 1 to `largest`, even in their logarithms."""
    return sorted({round(largest ** (i / (count - 1))) for i in range(count)})
