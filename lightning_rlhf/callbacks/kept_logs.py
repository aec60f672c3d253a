"""Guard that lets a run survive the write errors of its loggers, such as a full disk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_rlhf.callbacks.torn import discard

logger = logging.getLogger(__name__)


def keep_logs(trainer: Trainer) -> None:
    """Continue training if a logger of the trainer cannot write, and log its first error.

    The rows that CSVLogger could not write are written by a later call.
    """
    for log in trainer.loggers:
        if isinstance(log.save, partial):
            continue
        told: list[str] = []
        for name in ("log_metrics", "save", "finalize"):
            setattr(log, name, partial(_call, getattr(log, name), log, told))


def _call(method: Callable[..., Any], log: Logger, told: list[str], *arguments: Any, **options: Any) -> None:
    try:
        with _whole(log):
            method(*arguments, **options)
    except Exception as error:
        problem = error.__cause__ if isinstance(error, ValueError) else error  # TensorBoardLogger wraps it
        if not isinstance(problem, OSError):
            raise
        if not told:
            logger.error("%s could not write (%s): training goes on", type(log).__name__, problem)
        told.append(str(problem))


@contextmanager
def _whole(log: Logger) -> Iterator[None]:
    """Restore CSVLogger's file after an OSError; the rows stay in memory."""
    writer: Any = log._experiment if isinstance(log, CSVLogger) else None
    if writer is None:
        yield
        return
    path, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
    part, copied = path.with_name(path.name + ".part"), False
    size = path.stat().st_size if path.is_file() else None
    try:
        if size is not None and not set().union(*writer.metrics) <= set(keys):  # then the file is written anew
            shutil.copyfile(path, part)
            copied = True
        yield
    except OSError:
        writer.metrics_keys = keys
        if size is None:
            discard(path)
        elif copied:
            os.replace(part, path)
        else:
            os.truncate(path, size)
        raise
    finally:
        discard(part)
