"""A JSONL file of one run, which after a resume holds what that of an uninterrupted run would."""

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
"""A record with its place among those of all processes."""
OPENING = re.compile(rb'\{"iteration": (\d+)[,}]')
"""How every line begins: a log of gigabytes is cut without parsing it."""


class RunFile:
    """Grows by whole lines, all of a rollout or an evaluation at once; each begins with its `iteration`.

    Process 0 writes what all have; meanwhile no other run may. Where the disk refuses, what was half written is taken
    back and training goes on. Text is escaped as JSON in ASCII: no line of it moves a terminal's cursor or breaks in
    two.

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
        """Find the file, on all processes; on process 0 cut off what belongs to a rollout that is no more.

        Args:
            trainer: whose folder and processes.
            before: the first `iteration` of which nothing is kept; 0 begins anew and moves an earlier file aside.

        Raises:
            ValueError: another run holds the file, or the folder cannot be written to.
        """
        self.path = None if trainer.fast_dev_run else place_of(trainer, self.folder) / self.name
        if self.path is None:
            return
        self._lock.claim(trainer, self.path.with_name(f".{self.name}.lock"), argument="folder")
        on_first(trainer, partial(self._cut, self.path, before), folder=self.path.parent, argument="folder")

    def end(self) -> None:
        """Let other runs write the file."""
        self._lock.release()

    def _cut(self, path: Path, before: float) -> None:
        if before == 0 and path.exists() and path.stat().st_size:
            logger.warning("%s was of an earlier run: it is now %s", path, move_file(path))
        with path.open("ab") as file:
            file.truncate(_end_of(path, before))

    def gathered(self, trainer: Trainer, keyed: Iterable[Keyed]) -> list[dict[str, Any]]:
        """The records of all processes in the order of their keys, on process 0; elsewhere none."""
        mine = list(keyed)
        if trainer.world_size > 1:
            found: list[Any] | None = [None] * trainer.world_size if trainer.is_global_zero else None
            torch.distributed.gather_object(mine, found)
            mine = [pair for part in found or [] for pair in part]
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
        """Take out lines, all at once: the file is written anew and renamed, or stays as it is."""
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
    """Lets go of its `file` when a stage ends, however it ends."""

    file: RunFile

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, which an export must not replace."""
        self.file.place = place_of(trainer, self.file.folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let other runs write the file."""
        self.file.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let other runs write the file."""
        self.file.end()


def _end_of(path: Path, before: float) -> int:
    """Bytes up to the first line that is torn, or of iteration `before` or later."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            found = OPENING.match(line)
            if found is None or int(found[1]) >= before or not line.endswith(b"\n"):
                break
            end += len(line)
    return end
