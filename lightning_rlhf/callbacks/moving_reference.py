"""Reference that follows the policy during training (Gorbatovski et al. 2024, TR-DPO)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy

from lightning_rlhf.core.checks import check_count


class MovingReference(Callback):
    """π_ref ← α·π_θ + (1 − α)·π_ref at regular intervals, the soft update of Gorbatovski et al. (2024).

    The weights are those that train, not the average of `EMA`. A moved reference is in the checkpoint, for
    a resumed run and for an evaluation of the checkpoint. `objective/kl`, `KLGuard` and `AdaptiveKL` measure from the
    reference of the moment; win rates are against new responses of it.

    Args:
        alpha: α in (0, 1]; at 1 the reference becomes the policy, the paper's hard update.
        every: rollouts of `PPOModule` between two updates; of `PreferenceModule`, optimizer steps.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, alpha: float = 0.6, every: int = 512) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must lie in (0, 1]: got {alpha}; without MovingReference the reference stays")
        check_count(every=every)
        self.alpha, self.every = alpha, every
        self._done = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Check that the reference can move.

        Raises:
            ValueError: the module has no reference, or not one with weights like the policy's, or the module caches
                what its reference says, or the strategy is FSDP1.
        """
        if not hasattr(pl_module, "reference"):
            raise ValueError(
                f"MovingReference needs a reference, which {type(pl_module).__name__} has not: leave it out, or train "
                "a PPOModule or PreferenceModule"
            )
        if getattr(pl_module, "cache_reference", False):
            raise ValueError(
                "`cache_reference` keeps what the reference said at the start, which is stale once MovingReference "
                "moves it: set `cache_reference` to false, or leave MovingReference out"
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ValueError(
                "MovingReference cannot mix weights that FSDPStrategy (FSDP1) shards: shard with ModelParallelStrategy "
                "(configs/strategy/fsdp2.yaml)"
            )
        pl_module.reference.check_movable()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin to count where the run begins or resumes."""
        self._done = _count(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the reference if it is time."""
        done = _count(trainer, pl_module)
        if done > self._done and done % self.every == 0:
            pl_module.reference.move(self.alpha)
        self._done = done


def _count(trainer: Trainer, pl_module: Any) -> int:
    """Number of rollouts or optimizer steps of the run so far."""
    return int(getattr(pl_module, "iteration", trainer.global_step))
