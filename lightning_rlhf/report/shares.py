"""Figure of the shares of held-out prompts that are solved or won."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_rlhf.report.figure import Figure, Mark, Missing, Points
from lightning_rlhf.report.palette import color
from lightning_rlhf.report.quantity import ROLLOUTS
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import NORMAL, Interval, thinned

TITLE = "Held-out prompts solved or won"
_NAMES = re.compile(r"(eval|test)(?:@([^/]+))?/((?:pass|majority)_at_\d+|win_rate)")


def share_names(run: Run) -> dict[str, str]:
    """Return the logged names of the shares of all held-out sets by label.

    A name of the test stands only where there is none of the validation.
    """
    names: dict[str, str] = {}
    for stage in ("eval", "test"):
        for name in run.metrics.series:
            match = _NAMES.fullmatch(name)
            if match and match[1] == stage:
                share = match[3].replace("_at_", "@").replace("_", " ")
                names.setdefault(f"{share}, {match[2]}" if match[2] else share, name)
    return names


def shares(runs: Sequence[Run]) -> Figure | Missing:
    """Compose the figure of the shares of prompts over a run with their 95 % confidence."""
    marks: list[Mark] = []
    for run in runs:
        for place, (label, name) in enumerate(share_names(run).items()):
            series, errors = run.metrics[name], run.metrics[f"{name}_se"]
            points = thinned(series)
            known = dict(zip(errors.x, errors.y, strict=True))
            bars: list[Interval] = []
            if all(x in known for x in points.x):
                halves = [NORMAL * known[x] for x in points.x]
                bars = [(max(y - h, 0.0), min(y + h, 1.0)) for y, h in zip(points.y, halves, strict=True)]
            told = (label, color(place)) if len(runs) == 1 else (f"{run.name}, {label}", run.color)
            marks.append(Points(label=told[0], x=points.x, y=points.y, color=told[1], intervals=bars))
    if not marks:
        remedy = "needs eval/pass_at_N, eval/majority_at_N or eval/win_rate, from `PassAtK`, `MajorityAtK` or `WinRate`"
        return Missing(title=TITLE, remedy=f"{remedy} among `--model.evaluations`")
    caption = (
        "pass@k: one of k responses is right. majority@k: the answer that most of k give is. Win rate: the response is "
        "preferred to the reference's. Bars: 95 % confidence of the mean over prompts."
    )
    return Figure(name="shares", title=TITLE, x=ROLLOUTS, y="share", marks=marks, caption=caption, span=(0.0, 1.0))
