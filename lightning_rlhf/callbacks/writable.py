"""Folders that callbacks write to: where they are, and whether they can be written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Trainer


def place_of(trainer: Trainer, given: str | None, *below: str) -> Path:
    """Path that a callback writes to.

    Args:
        trainer: whose `default_root_dir` is the folder of the run.
        given: by the user; None is the place `below` the folder of the run.
        below: names of folders or of a file, from the outermost.
    """
    return Path(trainer.default_root_dir, *below) if given is None else Path(given).expanduser()


def on_first(trainer: Trainer, action: Callable[[], str | None], *, folder: Path, argument: str) -> None:
    """Do something in a folder on the first process, for all of them.

    Args:
        trainer: whose processes.
        action: returns what is wrong, or None.
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
    """Return if a folder can be written to, or be made; nothing is made.

    Raises:
        ValueError: on all processes, it cannot.
    """
    on_first(trainer, lambda: _probe(folder), folder=folder, argument=argument)


def _probe(folder: Path) -> None:
    """Look at the innermost folder that there is.

    Raises:
        OSError: it is a file, or nothing may be written into it.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written into {there}")
