"""The grid of the study: surrogate x KL to SFT or none x inner epochs, for the bandit and the model alike."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from lightning_rlhf import Surrogate
from lightning_rlhf.core import Clip, ImportanceSampling, KLPen

NAMES = ("CLIP", "KLPEN fixed", "KLPEN adaptive", "unclipped")
EPOCHS = (1, 4)
HELD_OUT = 48
"""Prompts on which the model is measured."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What carries the unit of the reward, and so differs between bandit and model."""

    beta: float
    """Price of a nat of KL to SFT, in the half of the grid that has it."""
    b: float
    """KLPEN's price of a nat of KL to the old policy; where it adapts, at the start."""
    target: float
    """KLPEN's target, nats per response."""

    def surrogate(self, name: str) -> Surrogate:
        """The surrogate of that name."""
        return {
            "CLIP": Clip(epsilon=0.2),
            "KLPEN fixed": KLPen(coef=self.b, target=None),
            "KLPEN adaptive": KLPen(coef=self.b, target=self.target),
            "unclipped": ImportanceSampling(),
        }[name]

    def runs(self) -> Iterator[tuple[str, float, int]]:
        """(surrogate, beta, inner epochs) of every run."""
        return product(NAMES, (self.beta, 0.0), EPOCHS)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows, numbers at five significant digits; a new file gets its head first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
