"""Description of a figure before it is drawn: marks, units and caption."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.report.palette import FAINT, PAPER
from lightning_rlhf.report.statistics import Interval

Row = tuple[float | str, float, float | None, float | None]
"""x, y and the interval of y, if it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark(ABC):
    """Base class of series with a label and a color.

    Attributes:
        label: in the legend; "" omits it.
        x: along the axis.
        y: one number for each x.
        color: of the palette.
        intervals: of each y, or none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    intervals: Sequence[Interval] = ()

    @abstractmethod
    def draw(self, axis: Any) -> None:
        """Draw the mark on an axis of matplotlib."""

    def rows(self) -> Iterator[Row]:
        """Rows of `report.csv`."""
        bars: Sequence[tuple[float | None, float | None]] = self.intervals or [(None, None)] * len(self.x)
        for x, y, (low, high) in zip(self.x, self.y, bars, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Mark):
    """Line with a band, and with markers if it has few points.

    Attributes:
        raw: y before smoothing, drawn faintly behind the line.
    """

    raw: Sequence[float] = ()

    def draw(self, axis: Any) -> None:
        """Draw the line, its band and the raw values."""
        if self.raw:
            axis.plot(self.x, self.raw, color=self.color, linewidth=0.7, alpha=0.45, zorder=2)
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.fill_between(self.x, low, high, color=self.color, alpha=0.2, linewidth=0, zorder=1.5)
        marker = {"marker": "o", "markersize": 3.2} if len(self.x) <= 30 else {}
        axis.plot(self.x, self.y, color=self.color, linewidth=1.7, label=self.label, zorder=3, **marker)

    def rows(self) -> Iterator[Row]:
        """Rows of `report.csv`, before smoothing."""
        for (x, _, low, high), y in zip(Mark.rows(self), self.raw or self.y, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide(Mark):
    """Dashed line that is no measurement, such as a bound or a fit."""

    dashes: tuple[float, ...] = (5, 3)

    def draw(self, axis: Any) -> None:
        """Draw the line behind the data."""
        style = {"linewidth": 1.3, "dashes": self.dashes, "zorder": 2.5}
        axis.plot(self.x, self.y, color=self.color, label=self.label, **style)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Mark):
    """Rings with error bars of measurements on held-out data, joined by a thin line.

    Attributes:
        thread: width of the line; 0 if the points are not in order along x.
    """

    thread: float = 0.8

    def draw(self, axis: Any) -> None:
        """Draw the rings over everything else."""
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.vlines(self.x, low, high, color=self.color, linewidth=1, alpha=0.6, zorder=3.5)
        ring = {"markerfacecolor": PAPER, "markeredgewidth": 1.5, "markersize": 5.5 if len(self.x) <= 40 else 3}
        axis.plot(self.x, self.y, "o-", color=self.color, linewidth=self.thread, label=self.label, zorder=4, **ring)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots(Mark):
    """Scatter of dots that grow from the first to the last."""

    def draw(self, axis: Any) -> None:
        """Draw small dots behind the lines."""
        sizes = [9 + 24 * i / max(len(self.x) - 1, 1) for i in range(len(self.x))]
        axis.scatter(self.x, self.y, sizes, color=self.color, alpha=0.85, linewidths=0, zorder=2, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars(Mark):
    """Bars over categories beside those of other runs.

    Attributes:
        categories: names along the axis; `x` are their indices, shifted by the run's offset.
        width: of a bar, 1 from category to category.
        notes: above the bars.
    """

    categories: Sequence[str]
    width: float
    notes: Sequence[str] = ()

    def draw(self, axis: Any) -> None:
        """Draw bars from zero, with their intervals and notes."""
        axis.bar(self.x, self.y, self.width * 0.92, color=self.color, alpha=0.85, label=self.label, zorder=2)
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.vlines(self.x, low, high, color=FAINT, linewidth=1.2, zorder=3)
        tops = [high for _, high in self.intervals] or self.y
        for x, top, note in zip(self.x, tops, self.notes, strict=False):
            spot = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "color": FAINT, "fontsize": 7.5}
            axis.annotate(note, (x, top), **spot)

    def rows(self) -> Iterator[Row]:
        """Rows of `report.csv` by category."""
        for x, (_, y, low, high) in zip(self.x, Mark.rows(self), strict=True):
            yield self.categories[round(x)], y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Figure of one axis with its marks.

    Attributes:
        name: of its files.
        title: above it.
        x: label of the axis, with its unit.
        y: label of the axis, with its unit.
        marks: at least one.
        caption: below it, on what is drawn and how to read it.
        level: a value of y to draw a thin line at, such as a correlation of 0.
        span: of y, if it has natural ends; None for an end that the data sets.
    """

    name: str
    title: str
    x: str
    y: str
    marks: Sequence[Mark]
    caption: str
    level: float | None = None
    span: tuple[float, float | None] | None = None

    @property
    def alternative(self) -> str:
        """Alternative text for a screen reader."""
        parts = [f"{mark.label}: {_way(mark)}" for mark in self.marks if mark.label and len(mark.x)]
        return f"{self.title}: {self.y} against {self.x}. {'; '.join(parts)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Figure whose numbers are not in the logs.

    Attributes:
        title: of the figure.
        remedy: the missing logs, in one sentence; "" if the run has no such thing, and the page does not say it.
    """

    title: str
    remedy: str


def _way(mark: Mark) -> str:
    """Describe the first and last value of a mark, or its bars."""
    if isinstance(mark, Bars):
        return ", ".join(f"{mark.categories[round(x)]} {y:.3g}" for x, y in zip(mark.x, mark.y, strict=True))
    if len(mark.x) == 1:
        return f"{mark.y[0]:.3g} at {mark.x[0]:.3g}"
    return f"from {mark.y[0]:.3g} at {mark.x[0]:.3g} to {mark.y[-1]:.3g} at {mark.x[-1]:.3g}"
