"""JSONL file of a run that has the same lines after a resume as without an interruption."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_rlhf.callbacks.earlier import move_file
from lightning_rlhf.callbacks.run_lock import RunLock
from lightning_rlhf.callbacks.torn import discard
from lightning_rlhf.callbacks.writable import on_first, place_of

logger = logging.getLogger(__name__)

Keyed = tuple[tuple[int, ...], dict[str, Any]]
"""A record with its sort key among those of all processes."""
OPENING = re.compile(rb'\{"iteration": (\d+)[,}]')
"""Opening of every line, so that a log of gigabytes is cut without parsing it."""


class RunFile:
    """JSONL file that grows by all lines of a rollout or evaluation at once; each begins with its `iteration`.

    Process 0 writes the records of all and locks the file. If writing fails, half-written lines are removed and
    training goes on. Text is escaped as JSON in ASCII: no line of it moves a terminal's cursor or breaks in two.

    Args:
        folder: None is the trainer's `default_root_dir`.
        name: of the file.

    Attributes:
        place: the folder; None before `setup`.
        path: of the file; None before `begin`, and under `fast_dev_run`.
    """

    def __init__(self, folder: str | None, name: str) -> None:
        self.folder, self.name = folder, name
        self.place: Path | None = None
        self.path: Path | None = None
        self._lock = RunLock()

    def begin(self, trainer: Any, *, before: float) -> None:
        """Open the file; on process 0 lock it and cut off the lines of rollouts that a resume discards.

        Args:
            trainer: whose folder and processes.
            before: the first `iteration` whose lines are cut off; 0 begins anew and moves an earlier file aside.

        Raises:
            ValueError: another run has locked the file, or the folder cannot be written to.
        """
        self.path = None if trainer.fast_dev_run else place_of(trainer, self.folder) / self.name
        if self.path is None:
            return
        self._lock.claim(trainer, self.path.with_name(f".{self.name}.lock"), argument="folder")
        on_first(trainer, partial(self._cut, self.path, before), folder=self.path.parent, argument="folder")

    def end(self) -> None:
        """Unlock the file for other runs."""
        self._lock.release()

    def _cut(self, path: Path, before: float) -> None:
        if before == 0 and path.exists() and path.stat().st_size:
            logger.warning("%s was of an earlier run: it is now %s", path, move_file(path))
        with path.open("ab") as file:
            file.truncate(_end_of(path, before))

    def gathered(self, trainer: Trainer, keyed: Iterable[Keyed]) -> list[dict[str, Any]]:
        """Gather the records of all processes on process 0 in the order of their keys; others get none."""
        mine = list(keyed)
        if trainer.world_size > 1:
            parts: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(mine, parts)
            mine = [pair for part in parts or [] for pair in part]
        return [record for _, record in sorted(mine, key=lambda pair: pair[0])]

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the records, or none of them."""
        if self.path is None:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="ascii", newline="\n") as file:
                file.write("".join(json.dumps(record, default=str) + "\n" for record in records))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, before)
            logger.error("%s was not written to (%s): training goes on without these lines", self.path, error)

    def drop(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Remove unwanted lines atomically: the file is rewritten and renamed, or stays as it is."""
        if self.path is None or not self.path.exists():
            return
        part = self.path.with_name(self.path.name + ".part")
        try:
            with self.path.open(encoding="ascii") as lines, part.open("w", encoding="ascii", newline="\n") as kept:
                kept.writelines(line for line in lines if not unwanted(json.loads(line)))
            part.replace(self.path)
        except OSError as error:
            discard(part)
            logger.error("%s was not written anew (%s): it holds lines that are replaced", self.path, error)


class FileCallback(Callback):
    """Base class of callbacks with a `file` that is unlocked when a stage ends or fails."""

    file: RunFile

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolve the folder, which an export must not replace."""
        self.file.place = place_of(trainer, self.file.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unlock the file for other runs."""
        self.file.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unlock the file for other runs."""
        self.file.end()


def _end_of(path: Path, before: float) -> int:
    """Bytes up to the first line that is incomplete or of iteration `before` or later."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            opening = OPENING.match(line)
            if opening is None or int(opening[1]) >= before or not line.endswith(b"\n"):
                break
            end += len(line)
    return end
