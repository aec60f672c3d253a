"""Checkpoints from which a killed run resumes bit for bit."""

from __future__ import annotations

import logging
from copy import deepcopy
from os.path import expanduser, realpath
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lightning_rlhf.callbacks.batch_end import finish, following
from lightning_rlhf.callbacks.checked_io import CheckedIO, is_of_the_disk
from lightning_rlhf.callbacks.earlier import move_checkpoints
from lightning_rlhf.callbacks.kept_logs import keep_logs
from lightning_rlhf.callbacks.run_lock import RunLock
from lightning_rlhf.callbacks.signals import Signals
from lightning_rlhf.callbacks.torn import defect, discard, rename, settle
from lightning_rlhf.callbacks.writable import on_first, place_of

logger = logging.getLogger(__name__)

LAST = "last.ckpt"
PREVIOUS = "last-previous.ckpt"
LOCK = ".lock"


class RunCheckpoint(ModelCheckpoint):
    """Saves a run between two batches (PPO's batch is a rollout), at its end and on Ctrl-C or SIGTERM.

    `last.ckpt` in a fixed folder, so that `--ckpt_path last` finds it; the one before is kept. Each is written under
    another name, flushed to the disk and renamed. Where it cannot be written, as on a full disk, training goes on with
    a warning and the checkpoints before stay; so it does where a logger cannot write. `last` skips a corrupt one with a
    warning. A validation that is due after the batch that was saved is run when the checkpoint is resumed from. A run
    that does not go on from a checkpoint of the folder first moves those it finds into `earlier-1` there.

    Args:
        dirpath: the folder, locked for this run while it trains; None is `checkpoints` in the trainer's
            `default_root_dir`.
        every_n_batches: how often; optimizer steps play no part.
        monitor: a metric of validation, of which the best are kept as well; None keeps none.
        mode: whether more of it is better.
        save_top_k: how many are kept.

    Raises:
        ValueError: a number is too small; at the start of training, another run has locked the folder, or it cannot be
            written to.
    """

    def __init__(
        self,
        dirpath: str | None = None,
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
            save_on_train_epoch_end=False,  # but once a validation has measured `monitor`
        )
        self.every_n_batches = every_n_batches
        self.signals = Signals()
        self._follows = dirpath is None  # the trainer's folder
        self._lock = RunLock()
        self._step_of_last: int | None = None
        self._loops: dict[str, Any] | None = None  # the trainer's progress at the end of the last batch
        self._following: dict[str, Any] | None = None  # what follows that batch, and is not done
        self._stale = False  # a validation followed the last checkpoint
        self._max_steps: int | None = None  # the trainer's, while it is let in once more

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Lock the folder and verify checkpoints when they are read."""
        self._resolve(trainer)
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckedIO()
        if stage == "fit" and not trainer.fast_dev_run:
            self._lock.claim(trainer, self._folder / LOCK, argument="dirpath")

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Move an earlier run's checkpoints aside, guard loggers against a full disk and catch signals."""
        super().on_train_start(trainer, pl_module)
        keep_logs(trainer)
        here = (
            bool(trainer.ckpt_path) and Path(expanduser(trainer.ckpt_path)).parent.resolve() == self._folder.resolve()
        )
        self._step_of_last = trainer.global_step if here else None
        if trainer.ckpt_path and self._following is not None:
            finish(trainer, self._following)
            if not self._following["validation"]:
                self._limit_steps(trainer)
        self.signals.watch()
        if not here and not trainer.fast_dev_run:
            on_first(trainer, self._move_earlier, folder=self._folder, argument="dirpath")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is due, and end the run if any process received a signal."""
        leaving = trainer.strategy.reduce_boolean_decision(self.signals.received is not None, all=False)
        if trainer.fit_loop._should_accumulate():
            return  # gradients of half a step are in no checkpoint
        self._loops = deepcopy(trainer.fit_loop.state_dict())
        self._following = following(trainer)
        if leaving or (trainer.fit_loop.total_batch_idx + 1) % self.every_n_batches == 0:
            self._save_last_checkpoint(trainer, {})
        if leaving and not 0 <= trainer.max_steps <= trainer.global_step:
            self.signals.leave()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore `max_steps` if a finished run was resumed for this validation."""
        self._limit_steps(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best checkpoints and mark the validation as done."""
        if self._following is not None and self._following["validation"] and not trainer.sanity_checking:
            self._following = self._following | {"validation": False, "row": None}
            self._stale = True
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end and restore the signal handlers."""
        if self._stale or self._step_of_last != trainer.global_step:
            self._save_last_checkpoint(trainer, {})
        self.signals.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers and unlock the folder; save nothing, because the batch is half done."""
        self.signals.release()
        self._lock.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Unlock the folder."""
        super().teardown(trainer, pl_module, stage)
        self._lock.release()

    def state_dict(self) -> dict[str, Any]:
        """State of ModelCheckpoint and the work due after the saved batch."""
        return super().state_dict() | {"following": self._following}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of ModelCheckpoint and the work due after the saved batch."""
        super().load_state_dict(state_dict)
        self._following = state_dict.get("following")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the progress of the end of the last batch, also when training is over.

        Otherwise a run that `max_steps` ended in mid-epoch could not be made longer.
        """
        if self._loops is not None and "loops" in checkpoint:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Allow a finished run one more step. Otherwise Lightning would skip the work due after its last batch."""
        if trainer.state.fn != "fit" or "loops" not in checkpoint:  # of weights alone
            return
        self._loops = deepcopy(checkpoint["loops"]["fit_loop"])
        if 0 <= trainer.max_steps <= checkpoint["global_step"]:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def _limit_steps(self, trainer: Trainer) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._max_steps = None

    def file_exists(self, filepath: Any, trainer: Trainer) -> bool:
        """Return False always: a resumed run overwrites the best checkpoints of the killed run."""
        return False

    def _move_earlier(self) -> None:
        moved = move_checkpoints(self._folder)
        if moved is not None:
            logger.warning(
                "%s held checkpoints of an earlier run, which are now in %s: to go on with that run, stop this one, "
                "move them back and add --ckpt_path last",
                self._folder,
                moved,
            )

    def _resolve(self, trainer: Trainer) -> None:
        if self._follows:
            self.dirpath = realpath(place_of(trainer, None, "checkpoints"))

    @property
    def _folder(self) -> Path:
        return Path(str(self.dirpath))

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fast_dev_run:
            return
        last = self._folder / LAST
        self.last_model_path = str(last)
        before = self._folder / PREVIOUS if self._step_of_last != trainer.global_step else None
        if self._write(trainer, last, before=before):
            self._step_of_last = trainer.global_step
            self._stale = False

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if self._write(trainer, Path(filepath)):
            self._last_global_step_saved = trainer.global_step

    def _write(self, trainer: Trainer, path: Path, before: Path | None = None) -> bool:
        """Write a checkpoint, rename the present one to `before` and return True if all processes wrote theirs."""
        part = path.with_name(path.name + ".part")
        problem: BaseException | None = None
        try:
            trainer.save_checkpoint(part)
        except (Exception, CheckpointException) as error:
            if not is_of_the_disk(error):
                raise
            of_some = list(getattr(error, "failures", {}).values())  # a CheckpointException holds those of processes
            problem = of_some[0][0] if of_some else error
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
        self._resolve(trainer)  # a trainer looks for them before it sets callbacks up
        checkpoints = [path for path in (self._folder / LAST, self._folder / PREVIOUS) if path.exists()]
        for path in checkpoints:
            problem = defect(path)
            if problem is None:
                return {str(path)}
            logger.warning("%s is torn: %s; going on from the one before it", path, problem)
        if checkpoints:
            raise ValueError(f"no checkpoint in {self._folder} is whole: remove them to begin anew")
        return set()


def _name(part: Path, path: Path, before: Path | None) -> OSError | None:
    """Flush `part` to the disk and rename it to `path`; returns the error if that fails."""
    try:
        settle(part)
        if before is not None and path.exists():
            rename(path, before)
        rename(part, path)
    except OSError as error:
        return error
    return None
