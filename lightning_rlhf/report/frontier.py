"""Reward against √KL, with the fit of Gao et al. (2022) and best-of-n at the same KL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from lightning_rlhf.core import best_of_n_kl, expected_best
from lightning_rlhf.report.figure import Dots, Figure, Guide, Mark, Missing, Points
from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.palette import FAINT, INK
from lightning_rlhf.report.responses import Responses
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import thinned

AT_REFERENCE = 0.1
"""Largest distance in √nats of a start that counts as the reference, for noise; best-of-n needs such a start."""
TITLE = "Reward against distance: the frontier"
FEWEST = 5
"""Fewest points for a fit of three numbers, because almost any curve fits fewer."""
_TRAINING = ("objective/kl", "objective/scores")
_HELD_OUT = ("eval/kl", "eval/reward")


@dataclass(frozen=True, slots=True, kw_only=True)
class GaoCurve:
    """R(d) = R₀ + d·(α − β·log d), d = √KL(π‖π_ref) (Gao et al. 2022, scaling laws of overoptimization).

    Attributes:
        start: R₀, reward units; it is 0 in the paper.
        alpha: α, reward units per √nat.
        beta: β, reward units per √nat; > 0 if the reward bends down.
        residual: root mean square distance of the points, reward units.
    """

    start: float
    alpha: float
    beta: float
    residual: float

    def __call__(self, d: float) -> float:
        """Return R(d) for d ≥ 0."""
        return self.start if d == 0 else self.start + d * (self.alpha - self.beta * math.log(d))

    @property
    def peak(self) -> float | None:
        """Position e^(α/β − 1) of the largest R; None if R does not bend down or the peak is out of reach."""
        if self.beta <= 0 or self.alpha / self.beta > 50:
            return None
        return math.exp(self.alpha / self.beta - 1)


def fit_gao(d: Sequence[float], rewards: Sequence[float]) -> GaoCurve | None:
    """Fit the curve by least squares, which is linear in (R₀, α, β).

    Args:
        d: √KL of each point, ≥ 0.
        rewards: of each point.

    Returns:
        the curve; None if there are fewer than `FEWEST` different d, or they do not determine the three numbers.
    """
    if len({round(x, 9) for x in d}) < FEWEST:
        return None
    x, y = torch.tensor(d, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    bend = torch.where(x > 0, -x * x.clamp(min=1e-300).log(), 0.0)
    design = torch.stack([torch.ones_like(x), x, bend], 1)
    fit = torch.linalg.lstsq(design, y.unsqueeze(1), driver="gelsd")
    if int(fit.rank) < design.shape[1]:
        return None
    start, alpha, beta = fit.solution.flatten().tolist()
    residual = float((design @ fit.solution - y.unsqueeze(1)).square().mean().sqrt())
    return GaoCurve(start=start, alpha=alpha, beta=beta, residual=residual)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """Scores of best-of-n sampling from the policy before training.

    Attributes:
        d: √(log n − (n − 1)/n) for n = 1, 2, …: the KL of best-of-n is known exactly for scores without ties.
        rewards: E[max of n].
        largest: the n of the last point.
        pooled: True if responses to all prompts are pooled, because each has one: an upper bound.
    """

    d: tuple[float, ...]
    rewards: tuple[float, ...]
    largest: int
    pooled: bool


def best_of_start(rows: Sequence[Mapping[str, Any]]) -> BestOfN | None:
    """Compute best-of-n of the policy before training for n up to the number of responses.

    Args:
        rows: the first rollout or evaluation, with `prompt` and `score`.

    Returns:
        for n up to the fewest responses to a prompt if each has several; over all prompts otherwise; None for one
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
    """Spread about `count` integers from 1 to `largest` evenly in their logarithms."""
    return sorted({round(largest ** (i / (count - 1))) for i in range(count)})


def frontier(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of each run's points (√KL, reward), their fit and best-of-n."""
    marks: list[Mark] = []
    fits: list[str] = []
    bests: list[tuple[Run, BestOfN]] = []
    for run in runs:
        training, held_out = _points(run, *_TRAINING), _points(run, *_HELD_OUT)
        names = ("training", "held out", "fit") if len(runs) == 1 else (run.name, f"{run.name}, held out", "")
        if training:
            marks.append(Dots(label=names[0], x=training.x, y=training.y, color=run.color))
        if held_out:
            marks.append(Points(label=names[1], x=held_out.x, y=held_out.y, color=run.color, thread=0))
        for points, which in ((held_out, "held-out"), (training, "training")):
            curve = fit_gao(points.x, points.y)
            if curve is not None:
                marks.append(_fitted(curve, points, color=INK if names[2] else run.color, label=names[2]))
                fits.append(f"{run.name}, {which} points: {_told(curve, points)}")
                break
        best = _best(run)
        if best is not None:
            bests.append((run, best))
    if not marks:
        return Missing(title=TITLE, remedy="needs objective/kl and objective/scores, or eval/kl and eval/reward")
    marks += _bounds(bests)
    x = "√KL(π‖π_ref), √nats per response"
    caption = _caption(fits, bests)
    return Figure(name="frontier", title=TITLE, x=x, y="score, reward units", marks=marks, caption=caption)


def _points(run: Run, kl: str, reward: str) -> Series:
    """Points (√KL, reward) in the order of training; a KL below 0 is noise and counts as 0."""
    kls, rewards = run.metrics[kl], dict(zip(run.metrics[reward].x, run.metrics[reward].y, strict=True))
    logged = [(math.sqrt(max(y, 0.0)), rewards[x]) for x, y in zip(kls.x, kls.y, strict=True) if x in rewards]
    logged = [pair for pair in logged if all(map(math.isfinite, pair))]
    counted = _means(run.held_out if kl.startswith("eval") else run.rollouts)
    pairs = counted if len(counted) > len(logged) else logged  # samples have a state before training
    return thinned(Series(*zip(*pairs, strict=True))) if pairs else Series()


def _means(responses: Responses) -> list[tuple[float, float]]:
    kls, scores = responses.column("kl"), responses.column("score")
    return [(math.sqrt(max(fmean(kls[i]), 0.0)), fmean(scores[i])) for i in kls if i in scores]


def _fitted(curve: GaoCurve, points: Series, *, color: str, label: str) -> Guide:
    far = max(points.x)
    x = [far * i / 100 for i in range(101)]
    return Guide(label=label, x=x, y=[curve(d) for d in x], color=color)


def _told(curve: GaoCurve, points: Series) -> str:
    """Describe a curve, with its peak if that is in the measured range."""
    seen = curve.peak is not None and min(points.x) <= curve.peak <= max(points.x)
    where = f"it peaks at √KL = {curve.peak:.3g}" if seen else "no peak in the measured range"
    return f"α = {curve.alpha:.3g}, β = {curve.beta:.3g}, off by {curve.residual:.2g}; {where}"


def _best(run: Run) -> BestOfN | None:
    """Best-of-n of the state before training, if that was the reference."""
    for responses in (run.held_out, run.rollouts):
        kls = responses.column("kl").get(0, ())
        if 0 in responses.rows and len(kls) and abs(fmean(kls)) <= AT_REFERENCE**2:
            return best_of_start(responses.rows[0])
    return None


def _bounds(bests: Sequence[tuple[Run, BestOfN]]) -> list[Mark]:
    """Best-of-n curves, one for each start that differs."""
    alone = len({best.rewards for _, best in bests}) == 1
    marks: dict[tuple[float, ...], Mark] = {}
    for run, best in bests:
        of = "best of n" if alone else f"best of n, start of {run.name}"
        label = f"{of} ≤ {best.largest}{', upper bound' if best.pooled else ''}"
        marks.setdefault(best.rewards, Guide(label=label, x=best.d, y=best.rewards, color=FAINT, dashes=(1, 2)))
    return list(marks.values())


def _caption(told: Sequence[str], bests: Sequence[tuple[Run, BestOfN]]) -> str:
    parts = ["Up is better, right is farther from the reference; dots grow over training."]
    if told:
        curve = "R(d) = R₀ + d·(α − β·log d), d = √KL (Gao et al. 2022, with an R₀)"
        parts.append(f"Dashed: fit of {curve}: {'; '.join(told)}.")
    else:
        parts.append("No fit: Gao's curve needs five different KLs.")
    if bests:
        parts.append(
            "Best of n: of n responses of the policy before training, at KL = log n − (n − 1)/n"
            + (", pooled over prompts, so at most." if any(best.pooled for _, best in bests) else ".")
        )
    else:
        parts.append("Best-of-n is not shown: it needs samples.jsonl with an evaluation before training.")
    return " ".join(parts)
