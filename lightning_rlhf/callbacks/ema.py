"""Exponential moving average of the policy's weights (Ouyang et al. 2022, C.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_rlhf.callbacks.after_step import after_step
from lightning_rlhf.models.replica import sharded_as


class EMA(Callback):
    """θ̄ ← d·θ̄ + (1 − d)·θ after every optimizer step, of the trained weights of the policy alone.

    Validation, test, prediction and export see θ̄; training goes on with θ. The average is float32 at least and is in
    the checkpoint, so a resumed run continues it.

    Args:
        decay: d in [0, 1); the paper's is 0.992, a half-life of 86 steps.
    """

    def __init__(self, decay: float = 0.992) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must lie in [0, 1): got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._stop: Callable[[], None] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the policy's weights or the checkpoint's average, and hook the optimizer's steps.

        Raises:
            ValueError: the average is of another model, or DeepSpeed shards the weights.
        """
        weights = _weights(pl_module)
        if any(hasattr(weight, "ds_id") for weight in weights.values()):
            raise ValueError(
                "EMA cannot average weights that DeepSpeed's ZeRO stage 3 shards: take stage 2, or shard with "
                "ModelParallelStrategy (configs/strategy/fsdp2.yaml)"
            )
        begun = self.average or weights
        if begun.keys() != weights.keys():
            raise ValueError("the checkpoint's average is of another model: its trained parameters have other names")
        self.average = {name: _precise(sharded_as(weight, begun[name])) for name, weight in weights.items()}
        optimizer = trainer.optimizers[0]
        self._stop = after_step(optimizer, lambda: self.update(pl_module) if _stepped(optimizer) else None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shard a checkpoint's average as the weights are: some strategies load it only after `on_fit_start`."""
        weights = _weights(pl_module)
        self.average = {name: sharded_as(weights[name], tensor) for name, tensor in self.average.items()}

    @torch.no_grad()
    def update(self, pl_module: LightningModule) -> None:
        """Update the average by one step."""
        for name, weight in _weights(pl_module).items():
            average = self.average[name]
            average.lerp_(weight.to(average.dtype), 1 - self.decay)

    @contextmanager
    def applied(self, pl_module: LightningModule) -> Iterator[None]:
        """Context in which the policy has the averaged weights."""
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        if self._live or not self.average:
            return
        for name, weight in _weights(pl_module).items():
            self._live[name] = weight.detach().clone()
            weight.copy_(sharded_as(weight, self.average[name]))

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        for name, weight in _weights(pl_module).items():
            if name in self._live:
                weight.copy_(self._live[name])
        self._live = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the averaged weights."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the trained weights θ."""
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the trained weights θ if the average is swapped in."""
        if self._live:
            self._swap_out(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hook from the optimizer."""
        if self._stop is not None:
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Unsharded average by parameter name; all processes must call it if the weights are sharded."""
        return {"average": {name: _whole(tensor.detach().clone()) for name, tensor in self.average.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the average of a checkpoint."""
        self.average = dict(state_dict["average"])


def _stepped(optimizer: Any) -> bool:
    """Return True if torch's optimizer had a gradient: after `NonFiniteGuard` drops them its step does nothing."""
    if not isinstance(optimizer, Optimizer):
        return True
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _weights(pl_module: Any) -> dict[str, nn.Parameter]:
    """Trained parameters of the policy, or of the model in the other stages."""
    network = getattr(pl_module, "policy", None) or pl_module.model
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def _precise(weight: Tensor) -> Tensor:
    return weight.detach().clone().to(torch.promote_types(weight.dtype, torch.float32))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
