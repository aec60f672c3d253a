"""Actions on a rollout over the budget of KL or length."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from lightning_rlhf.callbacks.ema import EMA
from lightning_rlhf.callbacks.moving_reference import MovingReference

logger = logging.getLogger(__name__)


class GuardAction(ABC):
    """Base class of actions on a rollout over its budget; its state is in the checkpoint."""

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: B027
        """Prepare for a rollout that begins."""

    def keep(self) -> None:  # noqa: B027
        """Accept a rollout within its budget."""

    @abstractmethod
    def act(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """React to a rollout over its budget; `why` names the measured number and the budget."""

    def state(self) -> dict[str, float]:
        """State for a resumed run."""
        return {}

    def restore(self, state: dict[str, float], pl_module: LightningModule) -> None:  # noqa: B027
        """Restore `state` in a resumed run."""


class StopTraining(GuardAction):
    """Ends the run with an error before the rollout is in a checkpoint or an export."""

    def act(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Stop the run.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{why}: the run was stopped, and the last checkpoint is from before; raise the KL coefficient, lower the "
            "learning rate, or widen the budget"
        )


class RaiseKL(GuardAction):
    """Multiplies the KL coefficient β.

    Args:
        factor: above 1, each time.
    """

    def __init__(self, factor: float = 1.5) -> None:
        if factor <= 1:
            raise ValueError(f"`factor` must be above 1: got {factor}")
        self.factor = factor
        self._coef: float | None = None

    def act(self, trainer: Trainer, pl_module: Any, why: str) -> None:
        """Multiply β from the next rollout on.

        Raises:
            ValueError: β is 0.
        """
        if pl_module.algorithm.kl.coef == 0:
            raise ValueError(
                f"{why}, but `algorithm.beta` is 0 and stays so however often it is multiplied: set it above 0"
            )
        self._coef = pl_module.algorithm.kl.coef * self.factor
        pl_module.algorithm = pl_module.algorithm.with_beta(self._coef)
        logger.warning("%s: the KL coefficient is now %.4g", why, self._coef)

    def state(self) -> dict[str, float]:
        """β if it was raised: a fixed controller's is not in the checkpoint otherwise."""
        return {} if self._coef is None else {"coef": self._coef}

    def restore(self, state: dict[str, float], pl_module: Any) -> None:
        """Restore a raised β, but not an adaptive controller's: the module has restored that one."""
        if "coef" in state:
            self._coef = state["coef"]
            if not pl_module.algorithm.kl.state():
                pl_module.algorithm = pl_module.algorithm.with_beta(self._coef)


class RollBack(GuardAction):
    """Restores the last state whose rollout was within the budget.

    Restored are weights, optimizer, average, a reference that moves, β, surrogate and baseline. Prompts and random
    numbers go on, so that the same step is not taken again. The state is in main memory, twice: trained weights and
    optimizer. After a resume it is the checkpoint's until a rollout was within the budget.

    Args:
        limit: rollouts undone in a run before it stops.
    """

    def __init__(self, limit: int = 3) -> None:
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1: got {limit}")
        self.limit, self._undone = limit, 0
        self._good: dict[str, Any] = {}
        self._candidate: dict[str, Any] = {}

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the state that is about to sample; its rollout decides if it is kept.

        Raises:
            ValueError: DeepSpeed's engine has copies of the weights and would bring the newer ones back.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "RollBack cannot return to older weights under DeepSpeed, whose engine has copies of its own: take "
                "RaiseKL or StopTraining, or shard with ModelParallelStrategy (configs/strategy/fsdp2.yaml)"
            )
        self._candidate = _snapshot(trainer, pl_module)
        self._good = self._good or self._candidate

    def keep(self) -> None:
        """Keep the state that sampled a rollout within its budget."""
        self._good = self._candidate

    def act(self, trainer: Trainer, pl_module: LightningModule, why: str) -> None:
        """Restore the last state within the budget.

        Raises:
            RuntimeError: the limit is reached.
        """
        if self._undone == self.limit:
            raise RuntimeError(
                f"{why}, after {self.limit} roll-backs: the run was stopped; raise the KL coefficient or lower the "
                "learning rate"
            )
        self._undone += 1
        _return(self._good, trainer, pl_module)
        logger.warning("%s: back to the last state within the budget (%d of %d)", why, self._undone, self.limit)

    def state(self) -> dict[str, float]:
        """Number of rollouts undone."""
        return {"undone": self._undone}

    def restore(self, state: dict[str, float], pl_module: LightningModule) -> None:
        """Restore the number of rollouts undone."""
        self._undone = int(state.get("undone", 0))


def _average(trainer: Any) -> dict[str, Tensor]:
    return next((callback.average for callback in trainer.callbacks if isinstance(callback, EMA)), {})


def _trained(pl_module: LightningModule) -> dict[str, Tensor]:
    return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}


def _snapshot(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    """Copy the state to restore (weights, average, optimizers, algorithm) to main memory."""
    live: dict[str, Any] = {"weights": _trained(pl_module), "average": _average(trainer)}
    live = {kind: {name: t.detach() for name, t in tensors.items()} for kind, tensors in live.items()}
    live["optimizers"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
    kept: dict[str, Any] = {"algorithm": pl_module.algorithm}
    if any(isinstance(callback, MovingReference) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        kept["reference"] = pl_module.reference.weights()
    return copy.deepcopy(move_data_to_device(live, torch.device("cpu"))) | kept


@torch.no_grad()
def _return(snapshot: dict[str, Any], trainer: Trainer, pl_module: Any) -> None:
    """Restore a snapshot except the learning rates, which follow their schedule."""
    for kind, live in {"weights": _trained(pl_module), "average": _average(trainer)}.items():
        for name, tensor in live.items():
            tensor.copy_(snapshot[kind][name])
    for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(copy.deepcopy(state))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    if "reference" in snapshot:
        pl_module.reference.restore(snapshot["reference"])
    pl_module.algorithm = snapshot["algorithm"]
