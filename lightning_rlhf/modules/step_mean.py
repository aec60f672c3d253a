"""Mean loss over a whole optimizer step, including accumulated batches."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_rlhf.distributed.ranks import Ranks


class StepMean:
    """Mean Σ loss / Σ count over the batches of an optimizer step and all processes, under automatic optimization.

    Because the count of the whole step is known with its last batch alone, each batch is divided by the count of the
    first, and the gradients are multiplied by the missing factor before the step and before they are clipped.
    """

    def __init__(self) -> None:
        self._unit: Tensor | None = None  # count of the first batch
        self._count = self._total = torch.zeros(())

    def loss(self, module: LightningModule, total: Tensor, count: Tensor) -> Tensor:
        """Return the loss of a batch for `training_step`.

        Args:
            module: whose trainer accumulates and averages over processes.
            total: Σ loss of this process's batch, scalar.
            count: elements that count of the batch, of all processes, scalar.

        Returns:
            scalar, with the gradient that Lightning's divisions turn into this batch's share.

        Raises:
            ValueError: DeepSpeed accumulates, whose gradients nobody can multiply.
        """
        batches = module.trainer.accumulate_grad_batches
        if batches > 1 and isinstance(module.trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"`accumulate_grad_batches` is {batches}, but under DeepSpeed the mean over the whole step cannot be "
                "taken: set it to 1 and take a larger `batch_size`, or train with ddp or ModelParallelStrategy"
            )
        if self._unit is None:
            self._unit = count.clamp(min=1)
            self._count = self._total = torch.zeros_like(total.detach(), dtype=torch.float64)
        self._count = self._count + count
        self._total = self._total + Ranks(module).sum(total.detach()).double()
        return total / self._unit * (batches * module.trainer.world_size)

    @property
    def mean(self) -> Tensor:
        """Return the mean loss of the step's batches so far over all processes."""
        return self._total / self._count.clamp(min=1)

    @torch.no_grad()
    def finish(self, optimizer: Optimizer) -> None:
        """Rescale the gradients to the count of the whole step; call it in `on_before_optimizer_step`."""
        unit, self._unit = self._unit, None
        if unit is None or unit == self._count.clamp(min=1):
            return
        factor = float(unit / self._count.clamp(min=1))
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)
