"""Folders that callbacks write to, with a check that they are writable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer


def place_of(trainer: Trainer, given: str | None, *below: str) -> Path:
    """Resolve the path that a callback writes to.

    Args:
        trainer: whose `default_root_dir` is the folder of the run.
        given: by the user; None is the place `below` the folder of the run.
        below: names of folders or of a file, from the outermost.
    """
    return Path(trainer.default_root_dir, *below) if given is None else Path(given).expanduser()


def on_first(trainer: Trainer, action: Callable[[], str | None], *, folder: Path, argument: str) -> None:
    """Run an action in a folder on the first process, for all of them.

    Args:
        trainer: whose processes.
        action: returns an error message, or None.
        folder: for the error.
        argument: where the user gave the folder.

    Raises:
        ValueError: on all processes, something is wrong or the folder cannot be written to.
    """
    problem = None
    if trainer.is_global_zero:
        try:
            problem = action()
        except OSError as error:
            problem = f"can't write to {folder} ({error}): give a folder that can be written to"
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise ValueError(f"`{argument}`: {problem}")


def check_writable(trainer: Trainer, folder: Path, *, argument: str) -> None:
    """Raise if a folder can neither be written to nor be made; nothing is made.

    Raises:
        ValueError: on all processes, it cannot.
    """
    on_first(trainer, lambda: _probe(folder), folder=folder, argument=argument)


def _probe(folder: Path) -> None:
    """Check the innermost folder that exists.

    Raises:
        OSError: it is a file, or nothing may be written into it.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written into {there}")
