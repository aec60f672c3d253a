"""Reward against √KL, drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from lightning_rlhf.report.figure import Figure, Missing
from lightning_rlhf.report.frontier import BestOfN, GaoCurve, best_of_start, fit_gao
from lightning_rlhf.report.marks import Dots, Guide, Mark, Points
from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.palette import FAINT, INK
from lightning_rlhf.report.responses import Responses
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import thinned

AT_REFERENCE = 0.1
"""√nats that a start may seem to be from the reference by noise alone; a start further away is no best-of-n of it."""
TITLE = "Reward against distance: the frontier"


def frontier(runs: Sequence[Run]) -> Figure | Missing:
    """Draw each run's way through (√KL, reward), its fit, and the best of n responses of the start."""
    marks: list[Mark] = []
    told: list[str] = []
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
                told.append(f"{run.name}, {which} points: {_told(curve, points)}")
                break
        best = _best(run)
        if best is not None:
            bests.append((run, best))
    if not marks:
        return Missing(title=TITLE, remedy="needs objective/kl and objective/scores, or eval/kl and eval/reward")
    marks += _bounds(bests)
    names = {"name": "frontier", "title": TITLE, "x": "√KL(π‖π_ref), √nats per response", "y": "score, reward units"}
    return Figure(**names, marks=marks, caption=_caption(told, bests))


_TRAINING = ("objective/kl", "objective/scores")
_HELD_OUT = ("eval/kl", "eval/reward")


def _points(run: Run, kl: str, reward: str) -> Series:
    """(√KL, reward) where both were logged, in the order of training; a KL below 0 is noise around 0."""
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
    """Its numbers; a peak outside of what was measured is none."""
    seen = curve.peak is not None and min(points.x) <= curve.peak <= max(points.x)
    where = f"it peaks at √KL = {curve.peak:.3g}" if seen else "no peak in the measured range"
    return f"α = {curve.alpha:.3g}, β = {curve.beta:.3g}, off by {curve.residual:.2g}; {where}"


def _best(run: Run) -> BestOfN | None:
    """Best of n of the state before training, if that was the reference."""
    for responses in (run.held_out, run.rollouts):
        kls = responses.column("kl").get(0, ())
        if 0 in responses.rows and len(kls) and abs(fmean(kls)) <= AT_REFERENCE**2:
            return best_of_start(responses.rows[0])
    return None


def _bounds(bests: Sequence[tuple[Run, BestOfN]]) -> list[Mark]:
    """One for each start that differs: runs from the same policy and data share theirs."""
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
