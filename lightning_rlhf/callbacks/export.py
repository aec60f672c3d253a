"""Each stage's output as the next stage's input: a Hugging Face folder."""

from __future__ import annotations

import logging
from contextlib import nullcontext

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from lightning_rlhf.callbacks.ema import EMA

logger = logging.getLogger(__name__)


class Export(Callback):
    """Calls the module's `save_pretrained` when training ends; with the averaged weights where an `EMA` runs.

    Args:
        folder: written whole or not at all; what stood there before is replaced.
        merge_adapter: fold a LoRA adapter into the weights.
    """

    def __init__(self, folder: str, merge_adapter: bool = False) -> None:
        self.folder, self.merge_adapter = folder, merge_adapter

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out now, and not after training, what cannot be exported.

        Raises:
            ValueError: `merge_adapter` without an adapter, or weights that no process holds whole.
        """
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                f"Export writes whole weights, but {type(trainer.strategy).__name__} leaves each process a shard: take "
                "ModelParallelStrategy (configs/strategy/fsdp2.yaml), whose shards Export gathers, or train with ddp"
            )
        adapted = any(hasattr(module, "peft_config") for module in pl_module.modules())
        if self.merge_adapter and not adapted:
            raise ValueError("`merge_adapter` was asked for, but the model has no adapter: leave it out")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder, on the first process; the others hand it their shards where they have any."""
        if trainer.fast_dev_run:
            return
        average = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        with average.applied(pl_module) if average else nullcontext():
            _rescore(pl_module, average)
            self._write(trainer, pl_module)
        _rescore(pl_module, average)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        all_take_part = any(getattr(model, "blueprint", None) is not None for model in pl_module.modules())
        if trainer.is_global_zero or all_take_part:
            pl_module.save_pretrained(self.folder, merge_adapter=self.merge_adapter)
        if trainer.is_global_zero:
            logger.info("exported %s to %s", type(pl_module).__name__, self.folder)
        trainer.strategy.barrier("export")


def _rescore(pl_module: LightningModule, average: EMA | None) -> None:
    """Give a reward model the bias of the weights it has by now, where an average has been put in or out."""
    if average is not None and hasattr(pl_module, "score_demonstrations"):
        pl_module.score_demonstrations()
