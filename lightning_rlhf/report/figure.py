"""A figure before it is drawn: marks, units, and a caption that says what one should see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.report.palette import FAINT, PAPER
from lightning_rlhf.report.statistics import Interval

Row = tuple[float | str, float, float | None, float | None]
"""x, y, and the interval of y where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark(ABC):
    """Numbers with a label and a color.

    Attributes:
        label: in the legend; "" keeps it out.
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
        """Put the mark on an axis of matplotlib."""

    def rows(self) -> Iterator[Row]:
        """Numbers of the mark."""
        bars: Sequence[tuple[float | None, float | None]] = self.intervals or [(None, None)] * len(self.x)
        for x, y, (low, high) in zip(self.x, self.y, bars, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Mark):
    """A line with a band, and with a marker at each point where there are few.

    Attributes:
        raw: what the line smooths, drawn faintly behind it.
    """

    raw: Sequence[float] = ()

    def draw(self, axis: Any) -> None:
        """Draw the line, its band, and what is behind them."""
        if self.raw:
            axis.plot(self.x, self.raw, color=self.color, linewidth=0.7, alpha=0.45, zorder=2)
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.fill_between(self.x, low, high, color=self.color, alpha=0.2, linewidth=0, zorder=1.5)
        marker = {"marker": "o", "markersize": 3.2} if len(self.x) <= 30 else {}
        axis.plot(self.x, self.y, color=self.color, linewidth=1.7, label=self.label, zorder=3, **marker)

    def rows(self) -> Iterator[Row]:
        """Numbers of the line before smoothing, with their band."""
        for (x, _, low, high), y in zip(Mark.rows(self), self.raw or self.y, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide(Mark):
    """A dashed line that is no measurement: a bound, a fit, what would be perfect."""

    dashes: tuple[float, ...] = (5, 3)

    def draw(self, axis: Any) -> None:
        """Draw the line behind the data."""
        style = {"linewidth": 1.3, "dashes": self.dashes, "zorder": 2.5}
        axis.plot(self.x, self.y, color=self.color, label=self.label, **style)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Mark):
    """Measurements on held-out data, ringed, with bars, joined by a thin line.

    Attributes:
        thread: width of the line; 0 where one step does not lead to the next along x.
    """

    thread: float = 0.8

    def draw(self, axis: Any) -> None:
        """Draw rings over everything else."""
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.vlines(self.x, low, high, color=self.color, linewidth=1, alpha=0.6, zorder=3.5)
        ring = {"markerfacecolor": PAPER, "markeredgewidth": 1.5, "markersize": 5.5 if len(self.x) <= 40 else 3}
        axis.plot(self.x, self.y, "o-", color=self.color, linewidth=self.thread, label=self.label, zorder=4, **ring)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots(Mark):
    """A cloud, from small at its beginning to large at its end."""

    def draw(self, axis: Any) -> None:
        """Draw small dots behind the lines."""
        sizes = [9 + 24 * i / max(len(self.x) - 1, 1) for i in range(len(self.x))]
        axis.scatter(self.x, self.y, sizes, color=self.color, alpha=0.85, linewidths=0, zorder=2, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars(Mark):
    """Bars over categories, beside those of the other runs.

    Attributes:
        categories: names along the axis; `x` are their places, moved by the run's.
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
        """Numbers by category."""
        for x, (_, y, low, high) in zip(self.x, Mark.rows(self), strict=True):
            yield self.categories[round(x)], y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One axis with its marks.

    Attributes:
        name: of its files.
        title: above it.
        x: label of the axis, with its unit.
        y: label of the axis, with its unit.
        marks: at least one.
        caption: below it: what is drawn, and how to read it.
        level: a value of y to draw a thin line at, such as a correlation of 0.
        span: of y, where it has natural ends; None for an end that the data sets.
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
        """The figure in words, for those who can't see it."""
        told = [f"{mark.label}: {_way(mark)}" for mark in self.marks if mark.label and len(mark.x)]
        return f"{self.title}: {self.y} against {self.x}. {'; '.join(told)}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A figure that the logs do not give.

    Attributes:
        title: of the figure.
        remedy: what would give it, one sentence.
    """

    title: str
    remedy: str


def _way(mark: Mark) -> str:
    """First and last value of a mark, or its bars."""
    if isinstance(mark, Bars):
        return ", ".join(f"{mark.categories[round(x)]} {y:.3g}" for x, y in zip(mark.x, mark.y, strict=True))
    if len(mark.x) == 1:
        return f"{mark.y[0]:.3g} at {mark.x[0]:.3g}"
    return f"from {mark.y[0]:.3g} at {mark.x[0]:.3g} to {mark.y[-1]:.3g} at {mark.x[-1]:.3g}"
