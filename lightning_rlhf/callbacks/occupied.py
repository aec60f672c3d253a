"""Check that an export replaces no folder that the run reads or writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

FOLDERS = ("dirpath", "place", "path")
"""Attributes of callbacks with the paths that they write to."""


def check_free(folder: str | Path, trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Raise if replacing the folder would remove a path that the run reads or writes.

    Args:
        folder: that `callback` is to replace.
        trainer: whose callbacks, loggers and data.
        pl_module: whose models.
        callback: itself.

    Raises:
        ValueError: the folder is, or holds, a path of the run.
    """
    here = _absolute(folder)
    for path, owner in _paths(trainer, pl_module, callback):
        there = _absolute(path)
        if here == there or here in there.parents:
            raise ValueError(
                f"`folder`: {type(callback).__name__} replaces {folder} as a whole, but {owner} has {path}: give a "
                "folder of its own"
            )


def _paths(trainer: Any, module: LightningModule, callback: Callback) -> Iterator[tuple[Any, str]]:
    for other in trainer.callbacks:
        for holder in (other, getattr(other, "file", None)):
            for path in _values(holder, FOLDERS):
                if other is not callback:
                    yield path, type(other).__name__
    for logger in trainer.loggers:
        for path in _values(logger, ("log_dir", "save_dir")):
            yield path, type(logger).__name__
    if trainer.datamodule is not None:
        for name, value in vars(trainer.datamodule).items():
            for path in _existing(value):
                yield path, f"the data's `{name}`"
    sources = (
        *getattr(module, "_sources", {}).values(),
        *getattr(module, "_source", ()),
        getattr(module, "reward", None),
    )
    for source in sources:
        for path in _existing(getattr(source, "path", None)):
            yield path, "a model that the run reads"


def _values(holder: Any, names: tuple[str, ...]) -> Iterator[Any]:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, str | os.PathLike) and str(value):
            yield value


def _existing(value: Any) -> Iterator[Any]:
    for path in value if isinstance(value, list | tuple) else [value]:
        if isinstance(path, str | os.PathLike) and path and _absolute(path).exists():
            yield path


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().resolve()
