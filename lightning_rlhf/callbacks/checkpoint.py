"""Checkpoints from which a run goes on to the bit, whenever it was killed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_rlhf.callbacks.checked_io import CheckedIO
from lightning_rlhf.callbacks.signals import Signals
from lightning_rlhf.callbacks.torn import defect, discard, rename, settle

logger = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "last-previous.ckpt"


class RunCheckpoint(ModelCheckpoint):
    """Saves between two batches (PPO's batch is a rollout), at the end, and on Ctrl-C or SIGTERM before it leaves.

    `last.ckpt` in a fixed folder, so that `--ckpt_path last` finds it; the one before is kept. Each is written under
    another name, brought to the disk and renamed. Where it cannot be written, as on a full disk, training goes on with
    a warning and the checkpoints before stay. `last` passes over one that is torn, and says so.

    Args:
        dirpath: the folder; one run's own.
        every_n_batches: how often; optimizer steps play no part.
        monitor: a metric of validation, of which the best are kept as well; None keeps none.
        mode: whether more of it is better.
        save_top_k: how many are kept.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_batches: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        save_top_k: int = 1,
    ) -> None:
        for name, number in {"every_n_batches": every_n_batches, "save_top_k": save_top_k}.items():
            if number < 1:
                raise ValueError(f"`{name}` must be at least 1: got {number}")
        kept = 0 if monitor is None else save_top_k
        super().__init__(
            dirpath,
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=kept,
            save_last=True,
            every_n_epochs=1,
        )
        self.every_n_batches, self.signals = every_n_batches, Signals()
        self._step_of_last: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let torn checkpoints be told when they are read."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckedIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen for signals; warn of what a new run replaces."""
        super().on_train_start(trainer, pl_module)
        self._step_of_last = trainer.global_step if trainer.ckpt_path else None
        self.signals.watch()
        if trainer.is_global_zero and not trainer.ckpt_path and (self._folder / LAST).exists():
            logger.warning(
                "%s holds checkpoints of an earlier run, which this one replaces: stop now and add --ckpt_path last to "
                "go on with that run, or give this one another `dirpath`",
                self._folder,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time; leave where some process was told to."""
        leaving = trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False)
        if trainer.fit_loop._should_accumulate():
            return  # gradients of half a step are in no checkpoint
        if leaving or (trainer.fit_loop.total_batch_idx + 1) % self.every_n_batches == 0:
            self._save_last_checkpoint(trainer, {})
        if leaving:
            self.signals.leave()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, and stop listening."""
        if self._step_of_last != trainer.global_step:
            self._save_last_checkpoint(trainer, {})
        self.signals.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save nothing: the batch is half done, and the last checkpoint is whole."""
        self.signals.release()

    @property
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fast_dev_run:
            return
        last = self._folder / LAST
        self.last_model_path = str(last)
        if self._write(trainer, last, before=self._folder / PREVIOUS):
            self._step_of_last = trainer.global_step

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._write(trainer, Path(filepath)):
            self._last_global_step_saved = trainer.global_step

    def _write(self, trainer: Trainer, path: Path, before: Path | None = None) -> bool:
        """Whether every process wrote its part; what has the name now gets the name `before`."""
        part, problem = path.with_name(path.name + ".part"), None
        try:
            trainer.save_checkpoint(part)
        except OSError as error:
            problem = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait
        if trainer.is_global_zero and problem is None:
            problem = _name(part, path, before)
        if trainer.strategy.reduce_boolean_decision(problem is None):
            self._last_checkpoint_saved = str(path)
            for log in trainer.loggers if trainer.is_global_zero else []:
                log.after_save_checkpoint(proxy(self))
            return True
        if trainer.is_global_zero:
            discard(part)
            logger.error("%s was not written (%s): training goes on, and those before stay", path, problem)
        return False

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        found = [path for path in (self._folder / LAST, self._folder / PREVIOUS) if path.exists()]
        for path in found:
            problem = defect(path)
            if problem is None:
                return {str(path)}
            logger.warning("%s is torn: %s; going on from the one before it", path, problem)
        if found:
            raise ValueError(f"no checkpoint in {self._folder} is whole: remove them to begin anew")
        return set()


def _name(part: Path, path: Path, before: Path | None) -> OSError | None:
    """Give what was written its name once it is on the disk; the error, if it cannot be."""
    try:
        settle(part)
        if before is not None and path.exists():
            rename(path, before)
        rename(part, path)
    except OSError as error:
        return error
    return None
