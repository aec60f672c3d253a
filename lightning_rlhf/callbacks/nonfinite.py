"""Guard against gradients that are NaN or infinite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.callbacks.checked_io import write
from lightning_rlhf.callbacks.torn import discard
from lightning_rlhf.callbacks.writable import check_writable, place_of

logger = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Skips an optimizer step whose gradients are not finite on some process, and saves its batch.

    Weights and optimizer stay as they were. Under fp16 the loss scaler does this itself and is left to it. DeepSpeed's
    engine skips such a step itself and exposes no gradients: there it is counted and its batch saved.

    Args:
        limit: steps skipped in a run before it stops; 0 stops at the first.
        folder: takes the batch and the names of the parameters concerned, a file for each process; None is `nonfinite`
            in the trainer's `default_root_dir`.

    Raises:
        ValueError: `limit` is negative; at the start, the folder cannot be written to.
    """

    def __init__(self, limit: int = 3, folder: str | None = None) -> None:
        if limit < 0:
            raise ValueError(f"`limit` must be at least 0: got {limit}")
        self.limit = limit
        self.folder = folder
        self.left_out = 0
        self.place: Path = None  # type: ignore[assignment]  # until `setup`
        self._batch: Any = None
        self._skipped = 0

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the folder can be written to.

        Raises:
            ValueError: it cannot.
        """
        self.place = place_of(trainer, self.folder, "nonfinite")
        if stage == "fit" and not trainer.fast_dev_run:
            check_writable(trainer, self.place, argument="folder")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch of the step."""
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients if any is not finite, so that the optimizer does nothing.

        Raises:
            RuntimeError: the limit is reached.
        """
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        named = {name: p for name, p in pl_module.named_parameters() if p.grad is not None}
        if trainer.strategy.reduce_boolean_decision(_all_finite(named)):
            return
        self._count(trainer, [name for name, p in named.items() if not _all_finite({name: p})])
        for p in named.values():
            p.grad = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read how many steps DeepSpeed's engine skipped before this run."""
        self._skipped = _skipped(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps that DeepSpeed's engine skipped.

        Raises:
            RuntimeError: the limit is reached.
        """
        before, self._skipped = self._skipped, _skipped(trainer)
        for _ in range(self._skipped - before):
            self._count(trainer, [])

    def state_dict(self) -> dict[str, int]:
        """Number of steps skipped."""
        return {"left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the number of steps skipped."""
        self.left_out = state_dict["left_out"]

    def _count(self, trainer: Trainer, parameters: list[str]) -> None:
        kept = self._dump(trainer, parameters)
        if self.left_out == self.limit:
            raise RuntimeError(
                f"the gradients of step {trainer.global_step} are not finite, and {self.limit} such steps were left "
                f"out already: the run was stopped; the last checkpoint is from before, {kept}; lower "
                "the learning rate, or train in float32 or bf16-mixed"
            )
        self.left_out += 1
        logger.warning(
            "the gradients of step %d are not finite: it is left out (%d of %d); %s",
            trainer.global_step,
            self.left_out,
            self.limit,
            kept,
        )

    def _dump(self, trainer: Trainer, parameters: list[str]) -> str:
        """Save the batch of this process and return a sentence with its path or the error."""
        path = self.place / f"step-{trainer.global_step}.rank{trainer.global_rank}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write({"parameters": parameters, "batch": _plain(self._batch)}, path)
        except OSError as error:
            discard(path)
            return f"the batch could not be written ({error})"
        return f"the batch is in {path}"


def _skipped(trainer: Trainer) -> int:
    """Number of steps DeepSpeed's engine skipped; 0 without it and under fp16, whose loss scaler skips some."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return 0
    engine = trainer.strategy.deepspeed_engine
    return 0 if engine.fp16_enabled() else int(engine.skipped_steps)


def _all_finite(named: Mapping[str, Tensor]) -> bool:
    """Return True if this process's gradients are finite, with one synchronization of the device."""
    gradients: list[Any] = [getattr(p.grad, "_local_tensor", p.grad) for p in named.values()]
    return not gradients or bool(torch.stack([g.isfinite().all() for g in gradients]).all())


def _plain(batch: Any) -> Any:
    """Convert a batch to dictionaries and lists, which load without pickle."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, dict):
        return {name: _plain(value) for name, value in batch.items()}
    return [_plain(value) for value in batch] if isinstance(batch, list | tuple) else batch
