"""The rows of a CSV file: chosen, averaged over seeds, compared seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

Row = dict[str, str]


class Estimate(NamedTuple):
    """A mean over seeds and its standard error; 0 of one seed, which has none."""

    mean: float
    error: float

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"

    @property
    def sure(self) -> bool:
        """More than two standard errors from 0."""
        return abs(self.mean) > 2 * self.error


def estimate(values: Sequence[float]) -> Estimate:
    return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0)


def chosen(rows: Sequence[Row], **where: object) -> list[Row]:
    """The rows whose cells equal these values, compared as numbers where they are numbers."""
    return [row for row in rows if all(_same(row[name], value) for name, value in where.items())]


def _same(cell: str, value: object) -> bool:
    if isinstance(value, str):
        return cell == value
    return bool(cell) and math.isclose(float(cell), float(value), rel_tol=1e-4)  # files keep five digits


def last(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last rollout."""
    end = max(int(row["rollout"]) for row in rows)
    return chosen(rows, rollout=end)


def numbers(rows: Sequence[Row], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def values(rows: Sequence[Row], name: str) -> list[float]:
    """The distinct numbers of a column, sorted."""
    return sorted(set(numbers(rows, name)))


def of(rows: Sequence[Row], name: str, **where: object) -> Estimate:
    """A column over the seeds, at the last rollout of the chosen rows."""
    return estimate(numbers(last(chosen(rows, **where)), name))


def difference(rows: Sequence[Row], name: str, one: dict[str, object], other: dict[str, object]) -> Estimate:
    """A column of the first choice less that of the second, seed by seed, at the last rollout."""
    first, second = ({row["seed"]: float(row[name]) for row in last(chosen(rows, **where))} for where in (one, other))
    return estimate([first[seed] - second[seed] for seed in sorted(first)])


def at_rollout(rows: Sequence[Row], name: str, rollout: float) -> float:
    """The mean of a column over the seeds, after that many rollouts."""
    return fmean(numbers(chosen(rows, rollout=rollout), name))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))


def listed(found: Iterable[float]) -> str:
    return ", ".join(f"{x:g}" for x in found) or "none"


def span(found: Sequence[float], digits: int = 2) -> str:
    """From the least to the most."""
    return f"{min(found):.{digits}f} to {max(found):.{digits}f}"
