"""What an earlier run left where this one writes: moved aside, never deleted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path


def move_file(path: Path) -> Path:
    """Give a file the first free name of `NAME.earlier-1.SUFFIX`, `NAME.earlier-2.SUFFIX`, …; that name."""
    name = _free(lambda number: path.with_name(f"{path.stem}.earlier-{number}{path.suffix}"))
    path.rename(name)
    return name


def move_checkpoints(folder: Path) -> Path | None:
    """Move a folder's checkpoints, files or folders, into the first free one of `earlier-1`, `earlier-2`, … in it.

    Returns:
        that folder; None where there was no checkpoint.
    """
    found = sorted(folder.glob("*.ckpt"))
    if not found:
        return None
    there = _free(lambda number: folder / f"earlier-{number}")
    there.mkdir()
    for path in found:
        path.rename(there / path.name)
    return there


def _free(name: Callable[[int], Path]) -> Path:
    return next(path for path in map(name, count(1)) if not path.exists())
