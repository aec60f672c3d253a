"""Gradients that are NaN or infinite, as those of such a loss are."""

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
    """Leaves out an optimizer step whose gradients are not finite on some process, and keeps what it came from.

    Weights and optimizer stay as they were. Under fp16 the loss scaler does this itself and is left to it. DeepSpeed's
    engine leaves such a step out by itself and shows nobody its gradients: there it is counted and its batch kept.

    Args:
        limit: steps left out in a run before it stops; 0 stops at the first.
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
        """Find out before training that the folder cannot be written to.

        Raises:
            ValueError: it cannot.
        """
        self.place = place_of(trainer, self.folder, "nonfinite")
        if stage == "fit" and not trainer.fast_dev_run:
            check_writable(trainer, self.place, argument="folder")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the step comes from."""
        self._batch = batch

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the gradients; without any, the optimizer does nothing.

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
        """Under DeepSpeed, remember what its engine left out before this run."""
        self._skipped = _skipped(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what DeepSpeed's engine left out.

        Raises:
            RuntimeError: the limit is reached.
        """
        before, self._skipped = self._skipped, _skipped(trainer)
        for _ in range(self._skipped - before):
            self._count(trainer, [])

    def state_dict(self) -> dict[str, int]:
        """How many steps were left out."""
        return {"left_out": self.left_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Count on."""
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
        """Where the batch is."""
        path = self.place / f"step-{trainer.global_step}.rank{trainer.global_rank}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write({"parameters": parameters, "batch": _plain(self._batch)}, path)
        except OSError as error:
            discard(path)
            return f"the batch could not be written ({error})"
        return f"the batch is in {path}"


def _skipped(trainer: Trainer) -> int:
    """Steps that DeepSpeed's engine left out so far; 0 where it is not used or a loss scaler looks for its scale."""
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return 0
    engine = trainer.strategy.deepspeed_engine
    return 0 if engine.fp16_enabled() else int(engine.skipped_steps)


def _all_finite(named: Mapping[str, Tensor]) -> bool:
    """Whether the shards here are: one wait for the device."""
    gradients: list[Any] = [getattr(p.grad, "_local_tensor", p.grad) for p in named.values()]
    return not gradients or bool(torch.stack([g.isfinite().all() for g in gradients]).all())


def _plain(batch: Any) -> Any:
    """A batch as dictionaries and lists, which load without pickle."""
    if isinstance(batch, Tensor):
        return batch.detach().cpu()
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    if isinstance(batch, dict):
        return {name: _plain(value) for name, value in batch.items()}
    return [_plain(value) for value in batch] if isinstance(batch, list | tuple) else batch
