"""The demonstration bias of the weights that training ends with."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class DemonstrationBias(Callback):
    """Scores the demonstrations when training ends, before other callbacks save or export the reward model.

    `RewardModule` adds it to the trainer's callbacks, as the first.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the bias, over all processes."""
        pl_module.score_demonstrations()
