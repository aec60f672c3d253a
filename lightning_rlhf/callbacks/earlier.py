"""Moving an earlier run's files aside instead of deleting them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path


def move_file(path: Path) -> Path:
    """Rename a file to `NAME.earlier-N.SUFFIX` with the first free N from 1 and return that path."""
    name = _free(lambda number: path.with_name(f"{path.stem}.earlier-{number}{path.suffix}"))
    path.rename(name)
    return name


def move_checkpoints(folder: Path) -> Path | None:
    """Move a folder's checkpoints (files or folders) to `earlier-N` in it, with the first free N from 1.

    Returns:
        that folder; None if there was no checkpoint.
    """
    checkpoints = sorted(folder.glob("*.ckpt"))
    if not checkpoints:
        return None
    there = _free(lambda number: folder / f"earlier-{number}")
    there.mkdir()
    for path in checkpoints:
        path.rename(there / path.name)
    return there


def _free(name: Callable[[int], Path]) -> Path:
    return next(path for path in map(name, count(1)) if not path.exists())
