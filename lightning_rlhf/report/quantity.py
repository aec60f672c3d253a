"""Figure of one logged number against training steps, on training and held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_rlhf.report.figure import Figure, Line, Mark, Missing, Points
from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.palette import color
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import Interval, by_iteration, smoothed, thinned

ROLLOUTS, STEPS = "rollouts trained on", "optimizer steps"
MANY = 60
"""Number of points above which a line is smoothed."""
Columns = Mapping[int, Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """Factory of a figure from logged names.

    Attributes:
        name: of the figure's files.
        title: of the figure.
        y: label, with the unit.
        caption: below the figure.
        remedy: the missing logs, if nothing of it was logged; "" leaves the figure out without a word.
        line: logged names, of which the first that a run has is drawn as a line.
        points: of another number, drawn as rings.
        labels: of line and points.
        column: key of `rollouts.jsonl` and `samples.jsonl` that the number is the mean of; "" for none.
        interval: of a rollout's values, drawn around the mean.
        x: label of the axis.
        level: as of `Figure`.
        span: as of `Figure`.
    """

    name: str
    title: str
    y: str
    caption: str
    remedy: str
    line: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    labels: tuple[str, str] = ("training", "held out")
    column: str = ""
    interval: Callable[[Sequence[float]], Interval] | None = None
    x: str = ROLLOUTS
    level: float | None = None
    span: tuple[float, float | None] | None = None

    def __call__(self, runs: Sequence[Run]) -> Figure | Missing:
        """Compose the figure of some runs from their logs."""
        marks = [mark for run in runs for mark in self._marks(run, alone=len(runs) == 1)]
        if not marks:
            return Missing(title=self.title, remedy=self.remedy)
        return Figure(
            name=self.name,
            title=self.title,
            x=self.x,
            y=self.y,
            marks=marks,
            caption=self.caption,
            level=self.level,
            span=self.span,
        )

    def _marks(self, run: Run, *, alone: bool) -> list[Mark]:
        trained = run.rollouts.column(self.column) if self.column else {}
        tested = run.held_out.column(self.column) if self.column else {}
        line = run.metrics.first(*self.line) or by_iteration(trained, fmean)
        points = by_iteration(tested, fmean) or run.metrics.first(*self.points)
        names = self.labels if alone else (run.name, f"{run.name}, {self.labels[1]}")
        marks: list[Mark] = []
        if line:
            marks.append(line_of(line, trained, self.interval, label=names[0], color=run.color))
        if points:
            points = thinned(points)
            bars = _intervals(points, tested, self.interval)
            label = names[1] if line or alone else run.name
            marks.append(Points(label=label, x=points.x, y=points.y, color=run.color, intervals=bars))
        return marks + self._named_sets(run, alone=alone)

    def _named_sets(self, run: Run, *, alone: bool) -> list[Mark]:
        """Rings of each held-out set with a name, in colors of their own where there is one run."""
        marks: list[Mark] = []
        for place, (name, responses) in enumerate(run.sets.items(), start=1):
            columns = responses.column(self.column) if self.column else {}
            logged = run.metrics.first(*(of_set(key, name) for key in self.points))
            points = thinned(by_iteration(columns, fmean) or logged)
            if points:
                label = name if alone else f"{run.name}, {name}"
                bars = _intervals(points, columns, self.interval)
                hue = color(place) if alone else run.color
                marks.append(Points(label=label, x=points.x, y=points.y, color=hue, intervals=bars))
        return marks


def of_set(key: str, name: str) -> str:
    """Return the logged name of a held-out number for a set with a name: `eval/kl` → `eval@NAME/kl`."""
    stage, _, number = key.partition("/")
    return f"{stage}@{name}/{number}" if name else key


def line_of(
    series: Series,
    columns: Columns,
    interval: Callable[[Sequence[float]], Interval] | None,
    *,
    label: str,
    color: str,
) -> Line:
    """Build a line with its band, smoothed if it has many points.

    Args:
        series: to draw.
        columns: iteration → the values that the series is the mean of; empty if unknown.
        interval: of such values.
        label: of the line.
        color: of the line.
    """
    series = thinned(series)
    bands = _intervals(series, columns, interval)
    if len(series.x) <= MANY:
        return Line(label=label, x=series.x, y=series.y, color=color, intervals=bands)
    edges = [smoothed(Series(series.x, edge)).y for edge in zip(*bands, strict=True)]
    bands = list(zip(*edges, strict=True))
    return Line(label=label, x=series.x, y=smoothed(series).y, color=color, intervals=bands, raw=series.y)


def _intervals(
    series: Series, columns: Columns, interval: Callable[[Sequence[float]], Interval] | None
) -> list[Interval]:
    """Intervals of all points; empty if the values of any are unknown."""
    if interval is None or not all(x in columns for x in series.x):
        return []
    return [interval(columns[int(x)]) for x in series.x]
