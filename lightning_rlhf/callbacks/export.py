"""Export of a trained model as a Hugging Face folder, the next stage's input."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from lightning_rlhf.callbacks.ema import EMA
from lightning_rlhf.callbacks.occupied import check_free
from lightning_rlhf.callbacks.writable import place_of
from lightning_rlhf.folders.atomic import check_writable

logger = logging.getLogger(__name__)

DType = Literal["float32", "float64", "bfloat16", "float16"]


class Export(Callback):
    """Calls the module's `save_pretrained` when training ends, with the averaged weights if an `EMA` runs.

    Args:
        folder: written whole or not at all; None is `model` in the trainer's `default_root_dir`. An earlier export is
            replaced, and is there until then; a folder that holds anything else is refused when training starts, as is
            one that holds a path of the run.
        merge_adapter: fold a LoRA adapter into the weights.
        dtype: of the weights in the folder; None is that in which they were trained, float32 under `bf16-mixed`.
    """

    def __init__(self, folder: str | None = None, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        self.folder = folder
        self.merge_adapter = merge_adapter
        self.dtype = dtype
        self.place: Path | None = None
        self._problem: Exception | None = None

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Check before training that the model can be exported.

        Raises:
            ValueError: the module has no `save_pretrained`; `merge_adapter` without an adapter; weights that no process
                holds whole; a folder that cannot be replaced or written.
        """
        self.place = place_of(trainer, self.folder, "model")
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                f"Export writes whole weights, but {type(trainer.strategy).__name__} leaves each process a shard: take "
                "ModelParallelStrategy (configs/strategy/fsdp2.yaml), whose shards Export gathers, or train with ddp"
            )
        if not hasattr(pl_module, "save_pretrained"):
            raise ValueError(
                f"Export calls `save_pretrained`, which {type(pl_module).__name__} has not: leave Export out"
            )
        adapted = any(hasattr(module, "peft_config") for module in pl_module.modules())
        if self.merge_adapter and not adapted:
            raise ValueError("`merge_adapter` was asked for, but the model has no adapter: leave it out")
        if not trainer.fast_dev_run:
            check_free(self.place, trainer, pl_module, self)
            check_writable(self.place)

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Write the folder on the first process, which gathers the shards of the others."""
        if trainer.fast_dev_run:
            return
        average = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        with average.applied(pl_module) if average else nullcontext():
            _rescore(pl_module, average)
            self._write(trainer, pl_module)
        _rescore(pl_module, average)

    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        all_take_part = any(getattr(model, "blueprint", None) is not None for model in pl_module.modules())
        given = {"merge_adapter": self.merge_adapter, "dtype": self.dtype}
        options = {name: value for name, value in given.items() if value}  # a module of the user's may take none
        try:
            if trainer.is_global_zero or all_take_part:
                pl_module.save_pretrained(self.place, **options)
        except (OSError, ValueError) as error:
            self._problem = error
        if trainer.is_global_zero and self._problem is None:
            logger.info("exported %s to %s", type(pl_module).__name__, self.place)
        trainer.strategy.barrier("export")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise the error of a failed export after the other callbacks have saved the run.

        Raises:
            ValueError: the folder could not be written.
        """
        if self._problem is not None:
            raise ValueError(
                f"the trained model was not exported to {self.place} ({self._problem}): once there is room, the same "
                "command with --ckpt_path last exports without training again, where a RunCheckpoint saved the end"
            ) from self._problem


def _rescore(pl_module: Any, average: EMA | None) -> None:
    """Recompute a reward model's bias after the averaged weights were swapped in or out."""
    if average is not None and hasattr(pl_module, "score_demonstrations"):
        pl_module.score_demonstrations()
