"""Callback that sets a reward model's demonstration bias for its final weights."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class DemonstrationBias(Callback):
    """Callback that scores the demonstrations when training ends, before others save the reward model.

    `RewardModule` adds it to the trainer's callbacks, as the first.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the demonstration bias over all processes."""
        pl_module.score_demonstrations()
