"""Resuming from a checkpoint that was written at the end of a training batch.

Three things may follow such a batch: its row in the loggers, the validation that is due, and the end of its epoch.
Lightning takes all three for done on resume, and does not count the epoch that begins next.
"""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage


def following(trainer: Trainer) -> dict[str, Any]:
    """Return the work that is due after this batch; call it in `on_train_batch_end`.

    Returns:
        whether a `validation` is due; the loggers' `row`, None if there is none, and its `step`.
    """
    connector = trainer._logger_connector
    row: dict[str, Any] | None = None
    if connector.should_update_logs and trainer.loggers:
        row = convert_tensors_to_scalars(connector.metrics["log"]) | {"epoch": trainer.current_epoch}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    return {"validation": _validation_is_due(trainer), "row": row, "step": step}


def finish(trainer: Trainer, state: dict[str, Any]) -> None:
    """Make the trainer do the work due after the batch; call it in `on_train_start` of a resumed run.

    Args:
        trainer: resumed from a checkpoint that was written in `on_train_batch_end`.
        state: returned by `following` then, as far as it is not done yet.
    """
    loop = trainer.fit_loop
    epoch = loop.epoch_loop
    log_row(trainer, state)
    if not epoch.restarted_on_train_batch_end:
        return
    validate = state["validation"] and _validation_is_due(trainer)
    epoch_ends = epoch.batch_progress.is_last_batch
    if epoch_ends and loop.restarted_mid_epoch:  # FitLoop.reset has counted this epoch
        for progress in (loop.epoch_progress.total, loop.epoch_progress.current):
            progress.processed -= 1  # type: ignore[attr-defined]
            progress.completed -= 1
    if validate:
        epoch.batch_progress.increment_completed()
        epoch._restart_stage = EpochStage.RESTARTED_ON_LAST
        epoch.val_loop.restarting = False
        epoch.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION  # what TrainingEpochLoop.advance asks
    elif epoch_ends:
        epoch._batches_that_stepped += 1
        loop.on_advance_end()
        epoch._batches_that_stepped -= 1  # TrainingEpochLoop.reset adds it again
        loop.reset_restart_stage()  # so that FitLoop.on_advance_start begins an epoch


def _validation_is_due(trainer: Trainer) -> bool:
    loop: Any = trainer.fit_loop
    timed = getattr(trainer, "_val_check_time_interval", None) is not None  # a clock cannot be resumed
    return not timed and bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def log_row(trainer: Trainer, state: dict[str, Any]) -> None:
    """Give the loggers the row of a batch, as far as there is one; `state` was returned by `following`."""
    for logger in trainer.loggers if state["row"] else ():
        logger.log_metrics(metrics=state["row"], step=state["step"])
        logger.save()
