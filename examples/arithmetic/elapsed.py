"""Seconds since the run began, beside what else it logs."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Elapsed(Callback):
    """Log of the wall-clock seconds since training began, validations included."""

    def __init__(self) -> None:
        self.start = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.log("elapsed", time.perf_counter() - self.start)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("eval/elapsed", time.perf_counter() - self.start)
