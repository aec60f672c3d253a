"""Checks of an object's numbers, with errors that say the value and the requirement."""

from __future__ import annotations

import math

MOST = 2**20
"""Largest count: more rows, tokens or steps at once than any machine takes."""


def check_positive(**numbers: float) -> None:
    """Raise ValueError unless every named number is finite and > 0."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be a number above 0: got {value}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError unless every named number is finite and ≥ 0."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number of at least 0: got {value}")


def check_count(**numbers: int) -> None:
    """Raise ValueError unless every named number is above 0 and at most `MOST`."""
    check_positive(**numbers)
    for name, value in numbers.items():
        if value > MOST:
            raise ValueError(f"`{name}` must be at most {MOST}: got {value}")


def check_unit_interval(**numbers: float) -> None:
    """Raise ValueError unless every named number lies in [0, 1]."""
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1]: got {value}")


def check_finite(**numbers: float) -> None:
    """Raise ValueError unless every named number is finite."""
    for name, value in numbers.items():
        if not -math.inf < value < math.inf:
            raise ValueError(f"`{name}` must be a finite number: got {value}")
