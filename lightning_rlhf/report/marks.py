"""Marks of a figure, each with its numbers: lines with bands, points with intervals, bars."""

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
    """Something with a label and a color.

    Attributes:
        label: in the legend; "" keeps it out.
        x: along the axis.
        y: one number for each x.
        color: of the palette.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str

    @abstractmethod
    def draw(self, axis: Any) -> None:
        """Put it on an axis of matplotlib."""

    def rows(self) -> Iterator[Row]:
        """Its numbers."""
        for x, y in zip(self.x, self.y, strict=True):
            yield x, y, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line(Mark):
    """A line; with a marker at each point where there are few.

    Attributes:
        intervals: of each y, drawn as a band.
        raw: what the line smooths, drawn faintly behind it.
    """

    intervals: Sequence[Interval] = ()
    raw: Sequence[float] = ()

    def draw(self, axis: Any) -> None:
        """Line, band, and what is behind them."""
        if self.raw:
            axis.plot(self.x, self.raw, color=self.color, linewidth=0.7, alpha=0.45, zorder=2)
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.fill_between(self.x, low, high, color=self.color, alpha=0.2, linewidth=0, zorder=1.5)
        marker = {"marker": "o", "markersize": 3.2} if len(self.x) <= 30 else {}
        axis.plot(self.x, self.y, color=self.color, linewidth=1.7, label=self.label, zorder=3, **marker)

    def rows(self) -> Iterator[Row]:
        """The line's numbers with their band; what it smooths where it does."""
        bands = self.intervals or [(None, None)] * len(self.x)
        for x, y, (low, high) in zip(self.x, self.raw or self.y, bands, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide(Mark):
    """A dashed line that is no measurement: a bound, a fit, what would be perfect."""

    dashes: tuple[float, ...] = (5, 3)

    def draw(self, axis: Any) -> None:
        """Behind the data."""
        style = {"linewidth": 1.3, "dashes": self.dashes, "zorder": 2.5}
        axis.plot(self.x, self.y, color=self.color, label=self.label, **style)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Mark):
    """Measurements on held-out data, ringed, joined by a thin line.

    Attributes:
        intervals: of each y, drawn as bars.
        thread: width of the line; 0 where one step does not lead to the next along x.
    """

    intervals: Sequence[Interval] = ()
    thread: float = 0.8

    def draw(self, axis: Any) -> None:
        """Rings over everything else."""
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.vlines(self.x, low, high, color=self.color, linewidth=1, alpha=0.6, zorder=3.5)
        ring = {"markerfacecolor": PAPER, "markeredgewidth": 1.5, "markersize": 5.5 if len(self.x) <= 40 else 3}
        axis.plot(self.x, self.y, "o-", color=self.color, linewidth=self.thread, label=self.label, zorder=4, **ring)

    def rows(self) -> Iterator[Row]:
        """Its numbers with their intervals."""
        bars = self.intervals or [(None, None)] * len(self.x)
        for x, y, (low, high) in zip(self.x, self.y, bars, strict=True):
            yield x, y, low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots(Mark):
    """A cloud, from small at its beginning to large at its end."""

    def draw(self, axis: Any) -> None:
        """Small, behind lines."""
        sizes = [6 + 24 * i / max(len(self.x) - 1, 1) for i in range(len(self.x))]
        axis.scatter(self.x, self.y, sizes, color=self.color, alpha=0.85, linewidths=0, zorder=2, label=self.label)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars(Mark):
    """Bars over categories, beside those of the other runs.

    Attributes:
        categories: names along the axis; `x` are their places, moved by the run's.
        width: of a bar, 1 from category to category.
        intervals: of each y.
        notes: above the bars.
    """

    categories: Sequence[str]
    width: float
    intervals: Sequence[Interval] = ()
    notes: Sequence[str] = ()

    def draw(self, axis: Any) -> None:
        """Bars from zero, with their intervals and notes."""
        axis.bar(self.x, self.y, self.width * 0.92, color=self.color, alpha=0.85, label=self.label, zorder=2)
        if self.intervals:
            low, high = zip(*self.intervals, strict=True)
            axis.vlines(self.x, low, high, color=FAINT, linewidth=1.2, zorder=3)
        tops = [high for _, high in self.intervals] or self.y
        for x, top, note in zip(self.x, tops, self.notes, strict=False):
            spot = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "color": FAINT, "fontsize": 7.5}
            axis.annotate(note, (x, top), **spot)

    def rows(self) -> Iterator[Row]:
        """By category."""
        bars = self.intervals or [(None, None)] * len(self.x)
        for x, y, (low, high) in zip(self.x, self.y, bars, strict=True):
            yield self.categories[round(x)], y, low, high
