"""Means with intervals, and reductions of long series."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, quantiles, stdev

from lightning_rlhf.report.metrics import Series

NORMAL = 1.96
"""Half-width of the central 95 % of a normal distribution, in standard deviations."""
Interval = tuple[float, float]


def mean_interval(values: Sequence[float]) -> Interval:
    """Interval of a mean at 95 % confidence: mean ± 1.96·s/√n; the mean twice for one value."""
    mean = fmean(values)
    half = NORMAL * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half


def deciles(values: Sequence[float]) -> Interval:
    """Interval of the middle 80 % of the values."""
    if len(values) < 2:
        return values[0], values[0]
    cut = quantiles(values, n=10, method="inclusive")
    return cut[0], cut[-1]


def share_interval(share: float, count: float) -> Interval:
    """Interval of a share of `count` at 95 % confidence (Wilson 1927), within [0, 1] also for shares of 0 and 1."""
    z = NORMAL * NORMAL
    center = (share + z / (2 * count)) / (1 + z / count)
    half = NORMAL * math.sqrt(max(share * (1 - share), 0) / count + z / (4 * count * count)) / (1 + z / count)
    return max(center - half, 0.0), min(center + half, 1.0)


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None if either does not vary or there are fewer than three values."""
    if len(x) < 3 or len(x) != len(y):
        return None
    a, b = fmean(x), fmean(y)
    xx, yy = math.fsum((v - a) ** 2 for v in x), math.fsum((v - b) ** 2 for v in y)
    if min(xx, yy) <= 1e-18 * max(len(x) * max(a * a, b * b), 1e-300):
        return None
    return math.fsum((v - a) * (w - b) for v, w in zip(x, y, strict=True)) / math.sqrt(xx * yy)


def by_iteration(columns: Mapping[int, Sequence[float]], of: Callable[[Sequence[float]], float] = fmean) -> Series:
    """Reduce each iteration's values to one number."""
    return Series(tuple(map(float, columns)), tuple(of(values) for values in columns.values()))


def thinned(series: Series, most: int = 400) -> Series:
    """Reduce a series to at most `most` points, means of consecutive ones."""
    size = math.ceil(len(series.x) / most)
    if size <= 1:
        return series
    cuts = range(0, len(series.x), size)
    return Series(*(tuple(fmean(values[cut : cut + size]) for cut in cuts) for values in (series.x, series.y)))


def smoothed(series: Series) -> Series:
    """Centered moving mean over a thirtieth of the run, at least five points."""
    half = max(len(series.y) // 60, 2)
    means = [fmean(series.y[max(i - half, 0) : i + half + 1]) for i in range(len(series.y))]
    return Series(series.x, tuple(means))
