"""Numbers of all logged responses, with the texts of the first and last evaluation."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlhf.report.lines import json_lines

NUMBERS = ("raw_score", "score", "length", "kl", "entropy")
"""Optional keys of a line beside `ended` and the parts `score/NAME`."""


@dataclass(slots=True)
class Responses:
    """Responses by iteration, the number of rollouts that their policy was trained on.

    Attributes:
        numbers: iteration → key → one number for each response, in the order of the file.
        rows: iteration → the lines themselves, of the first and the last iteration only, so that a log of any length
            fits the memory.
    """

    numbers: dict[int, dict[str, array[float]]] = field(default_factory=dict)
    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def column(self, key: str) -> dict[int, array[float]]:
        """Numbers under `key` by ascending iteration, without iterations that have none."""
        return {i: self.numbers[i][key] for i in sorted(self.numbers) if self.numbers[i].get(key)}

    @property
    def ends(self) -> tuple[int, ...]:
        """First and last iteration, once if they are equal."""
        return tuple(sorted({min(self.numbers), max(self.numbers)}))

    def add(self, row: dict[str, Any]) -> None:
        """Add a line and drop later iterations before it, which a resumed run repeats."""
        iteration = row["iteration"]
        if self.numbers and iteration < next(reversed(self.numbers)):  # a run that went on from a checkpoint
            self.numbers = {i: columns for i, columns in self.numbers.items() if i < iteration}
            self.rows = {i: rows for i, rows in self.rows.items() if i < iteration}
        columns = self.numbers.setdefault(iteration, {})
        for key in (*NUMBERS, "ended", *(key for key in row if key.startswith("score/"))):
            if isinstance(row.get(key), int | float) and math.isfinite(row[key]):
                columns.setdefault(key, array("d")).append(row[key])
        if iteration not in self.rows:
            self.rows = {i: rows for i, rows in self.rows.items() if i in self.ends} | {iteration: []}
        self.rows[iteration].append(row)


def read_rollouts(paths: Sequence[Path]) -> Responses:
    """Read the training responses.

    Args:
        paths: of files, oldest first.

    Raises:
        ValueError: a line lacks a column that a report needs; names file and line.
    """
    responses = Responses()
    for where, row in _lines(paths):
        _check(where, row, {"iteration": int, "score": float})
        responses.add(row)
    return responses


def read_samples(paths: Sequence[Path]) -> Mapping[str, Responses]:
    """Read the held-out responses by stage: `val` or `test`.

    Those of a held-out set with a name are below `val@NAME` or `test@NAME`.

    Args:
        paths: of files, oldest first.

    Raises:
        ValueError: a line lacks a column that a report needs; names file and line.
    """
    stages: dict[str, Responses] = {}
    for where, row in _lines(paths):
        _check(where, row, {"iteration": int, "score": float, "stage": str, "index": int})
        held_out = f"{row['stage']}@{row['set']}" if row.get("set") else row["stage"]
        stages.setdefault(held_out, Responses()).add(row)
    return stages


def _lines(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in paths:
        yield from json_lines(path)


def _check(where: str, row: Mapping[str, Any], needed: Mapping[str, type]) -> None:
    for key, kind in needed.items():
        value: Any = row.get(key)
        right = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
        if not right or (key == "iteration" and value < 0):
            what = {int: "a whole number", float: "a number", str: "a text"}[kind]
            least = " of at least 0" if key == "iteration" else ""
            raise ValueError(
                f"{where}: `{key}` must be {what}{least}, found {value!r:.60}; remove the line, or the file if another "
                "program wrote it"
            )
