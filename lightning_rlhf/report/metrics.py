"""Reader of `metrics.csv` of Lightning's CSVLogger, with one series for each logged name."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rlhf.report.lines import text_lines

EVALUATIONS = ("eval/", "test/", "eval@", "test@")
"""Prefixes of names measured on held-out data, after the step of their row; behind the `@` stands the set's name."""


@dataclass(frozen=True, slots=True)
class Series:
    """Logged number over a run.

    Attributes:
        x: steps (in the RL stage: rollouts) that had been trained on when it was measured, ascending.
        y: the number.
    """

    x: tuple[float, ...] = ()
    y: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.x)


@dataclass(frozen=True, slots=True)
class Metrics:
    """All series of a run, by logged name.

    Attributes:
        series: in the order of the file's columns, none empty.
    """

    series: Mapping[str, Series] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Series:
        """Return the series of a name, empty if nothing was logged under it."""
        return self.series.get(name, Series())

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the held-out sets that have one."""
        matches = (re.match(r"(?:eval|test)@([^/]+)/", name) for name in self.series)
        return tuple(dict.fromkeys(match[1] for match in matches if match))

    def first(self, *names: str) -> Series:
        """Return the series of the first name that was logged."""
        return next((self[name] for name in names if self[name]), Series())


def read_metrics(paths: Sequence[Path]) -> Metrics:
    """Read the series of a run from one log, or from several of which each resumes the one before.

    A training row of step i was measured by a policy after i steps. Lightning gives the evaluation that follows the
    same step, but it had i + 1; one that precedes every training row of its step had i. Where a later file begins, the
    rows of earlier ones are superseded: a run went on from a checkpoint before them.

    Args:
        paths: of `metrics.csv` files, oldest first.

    Raises:
        ValueError: a file is no log of a CSVLogger; names file, line and column.
    """
    points: dict[str, dict[float, float]] = {}
    for path in paths:
        rows = list(_rows(path))
        begin = min((step for step, _ in rows), default=float("inf"))
        points = {name: {x: y for x, y in values.items() if x <= begin} for name, values in points.items()}
        trained = -1.0
        for step, row in rows:
            trained = trained if _held_out(row) else max(trained, step)
            for name, value in row.items():
                behind = step + 1 if name.startswith(EVALUATIONS) and trained >= step else step
                points.setdefault(name, {})[behind] = value
    return Metrics({name: Series(*zip(*sorted(values.items()), strict=True)) for name, values in points.items()})


def first_step(path: Path) -> float:
    """Return the step of the earliest row, or infinity if there is none."""
    return min((step for step, _ in _rows(path)), default=float("inf"))


def _held_out(row: Mapping[str, float]) -> bool:
    return any(name.startswith(EVALUATIONS) for name in row)


def _rows(path: Path) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield the step and the numbers of each line."""
    lines = text_lines(path)
    _, header, whole = next(lines, (0, "", False))
    names = next(csv.reader([header]), [])
    if not whole:
        return  # an empty file, or a run killed while it wrote the header
    if "step" not in names:
        raise ValueError(
            f"{path}, line 1: there is no column `step` among {', '.join(names)[:120]!r}: a log of Lightning's "
            "CSVLogger has one; name the folder of such a log"
        )
    for number, line, complete in lines:
        if not complete:
            return  # even the last number of an incomplete line may have lost digits
        cells, where = next(csv.reader([line]), []), f"{path}, line {number}"
        if len(cells) != len(names):
            raise ValueError(
                f"{where}: {len(cells)} cells under {len(names)} columns; remove the line to go on without it"
            )
        row = {name: _number(cell, where, name) for name, cell in zip(names, cells, strict=True) if cell}
        if "step" not in row:
            raise ValueError(f"{where}, column `step`: empty; remove the line to go on without it")
        yield row.pop("step"), {name: value for name, value in row.items() if name != "epoch"}


def _number(cell: str, where: str, name: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(
            f"{where}, column `{name}`: found {cell[:40]!r}, which is no number; correct or empty it"
        ) from None
