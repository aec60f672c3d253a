"""Figures of a reward model, on accuracy and calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.report.figure import Bars, Figure, Guide, Mark, Missing, Points
from lightning_rlhf.report.palette import FAINT
from lightning_rlhf.report.quantity import STEPS, Quantity
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import share_interval

CONFIDENCES = ("50_60", "60_70", "70_80", "80_90", "90_100")
"""Bins of confidence in logged names, percent."""
MARGINS = tuple(math.log(p / (1 - p)) for p in (0.5, 0.6, 0.7, 0.8, 0.9))
"""Margins |r_w − r_l| at the lower ends of `CONFIDENCES`; confidence is σ of a margin."""
LENGTHS = ("shorter", "similar", "longer")
_REMEDY = "needs an evaluation on held-out rankings: run `fit` or `validate` of a RewardModule with `--data.val`"

ACCURACY = Quantity(
    name="accuracy",
    title="Accuracy on pairs",
    y="share of pairs ranked right",
    points=("eval/accuracy", "test/accuracy"),
    x=STEPS,
    level=0.5,
    caption="0.5 is a coin. Labelers agree with each other on about 0.73 of InstructGPT's pairs.",
    remedy=_REMEDY,
)
LOSS = Quantity(
    name="reward_loss",
    title="Ranking loss",
    y="nats per pair",
    line=("train/loss",),
    points=("eval/loss", "test/loss"),
    x=STEPS,
    level=math.log(2),
    caption="log 2, the thin line, is the loss of a model that knows nothing. Held-out rising alone is overfitting.",
    remedy=_REMEDY,
)
LENGTH_CORRELATION = Quantity(
    name="reward_length_correlation",
    title="Correlation of reward and length",
    y="Pearson's correlation",
    line=("eval/score_length_correlation", "test/score_length_correlation"),
    points=("eval/score_length_correlation_within_prompt", "test/score_length_correlation_within_prompt"),
    labels=("over all responses", "within prompts"),
    x=STEPS,
    level=0.0,
    caption="Near 1 the model scores lengths. Within prompts, what the prompt adds to both is taken out.",
    remedy=_REMEDY,
)


def reliability(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of accuracy against confidence."""
    marks: list[Mark] = [
        Guide(label="right as often as sure", x=(0.5, 1.0), y=(0.5, 1.0), color=FAINT),
    ]
    for run in runs:
        binned = _binned(run, [f"confidence_{name}" for name in CONFIDENCES])
        if binned:
            sure: list[Any] = [last(run, f"mean_confidence_{CONFIDENCES[i]}") for i in binned]
            bars = [share_interval(share, count) for share, count in binned.values()]
            shares = [share for share, _ in binned.values()]
            label = "held out" if len(runs) == 1 else run.name
            marks.append(Points(label=label, x=sure, y=shares, color=run.color, intervals=bars))
    if len(marks) == 1:
        return Missing(title="Reliability curve", remedy=_REMEDY)
    x = "confidence σ(|r_w − r_l|)"
    errors = [(run, last(run, "calibration_error")) for run in runs]
    listed = ", ".join(f"{error:.3f} ({run.name})" for run, error in errors if error is not None)
    caption = (
        "Below the dashed line the model is surer than it is right. Bars: 95 % confidence by the number of pairs."
        + f" Calibration error: {listed}." * bool(listed)
    )
    return Figure(name="reliability", title="Reliability curve", x=x, y="accuracy", marks=marks, caption=caption)


def accuracy_by_margin(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of accuracy by the margin between the two scores."""
    edges = [f"{low:.2g}–{high:.2g}" for low, high in zip(MARGINS, MARGINS[1:], strict=False)]
    return _by_bin(
        runs,
        [f"confidence_{name}" for name in CONFIDENCES],
        [*edges, f"over {MARGINS[-1]:.2g}"],
        name="accuracy_by_margin",
        title="Accuracy by margin",
        x="|r_w − r_l|, reward units",
        caption="Pairs by how far apart the model scores them; numbers are pairs, bars their 95 % confidence.",
    )


def accuracy_by_length(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of accuracy by the length difference of the pair."""
    return _by_bin(
        runs,
        LENGTHS,
        [f"{name} by > 10" if name != "similar" else "within 10" for name in LENGTHS],
        name="accuracy_by_length",
        title="Accuracy by length",
        x="preferred response, against the other, tokens",
        caption="A model that likes length is right where the preferred response is longer, wrong where it is shorter.",
    )


def _by_bin(
    runs: Sequence[Run],
    bins: Sequence[str],
    categories: Sequence[str],
    *,
    name: str,
    title: str,
    x: str,
    caption: str,
) -> Figure | Missing:
    marks: list[Mark] = []
    width = 0.7 / len(runs)
    for place, run in enumerate(runs):
        binned = _binned(run, bins)
        if binned:
            bars = Bars(
                label="held out" if len(runs) == 1 else run.name,
                x=[i + width * (place - (len(runs) - 1) / 2) for i in binned],
                y=[share for share, _ in binned.values()],
                color=run.color,
                categories=categories,
                width=width,
                intervals=[share_interval(share, count) for share, count in binned.values()],
                notes=[f"{count:.0f}" for _, count in binned.values()],
            )
            marks.append(bars)
    if not marks:
        return Missing(title=title, remedy=_REMEDY)
    names = {"name": name, "title": title, "x": x, "y": "share of pairs ranked right"}
    return Figure(**names, marks=marks, caption=caption, level=0.5, span=(0.0, 1.0))


def _binned(run: Run, bins: Sequence[str]) -> Mapping[int, tuple[float, float]]:
    """Map bins that have pairs to (accuracy, pairs) at the last evaluation."""
    binned = {i: (last(run, f"accuracy_{name}"), last(run, f"pairs_{name}")) for i, name in enumerate(bins)}
    return {i: (share, pairs) for i, (share, pairs) in binned.items() if share is not None and pairs}


def last(run: Run, name: str) -> float | None:
    """Return a number of the last evaluation; None if it was not logged, as of a bin without pairs."""
    for stage in ("eval", "test"):
        series, latest = run.metrics[f"{stage}/{name}"], run.metrics[f"{stage}/accuracy"]
        if series and latest:
            return series.y[-1] if series.x[-1] == latest.x[-1] else None
    return None
