"""Base class of the stages on rows of data: one network trained on the mean loss of whole optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import Schedule
from lightning_rlhf.core.settings import Difference
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.distributed.strategies import built_whole, shard_networks
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.models.source import DType
from lightning_rlhf.modules.networks import as_source, find_tokenizer
from lightning_rlhf.modules.optim import (
    begin_training,
    chosen_optimizer,
    learning_rate,
    picklable,
    refuse_finder,
    scheduled,
    trainable,
    training_steps,
)
from lightning_rlhf.modules.resume import check_resumable, keep_hyperparameters, settings, version
from lightning_rlhf.modules.revival import CheckedRevival


class SupervisedModule(CheckedRevival, LightningModule):  # type: ignore[misc]
    """Base class of a stage that trains one network on rows of data.

    Args:
        model: a folder or name, a source, or a module already built.
        tokenizer: of a built module; otherwise the one beside the weights.
        lr: learning rate of AdamW without weight decay; None is `default_lr`, or that of `optimizer`.
        optimizer: a function of the parameters, instead of `lr`.
        schedule: of the learning rate, per optimizer step.
        default_lr: learning rate of the stage's paper.
        deciding: other arguments in which a resumed run should agree with its checkpoint.
    """

    kind: str
    """Name of the stage in its checkpoints."""

    def __init__(
        self,
        model: ModelSource | str | nn.Module,
        tokenizer: PreTrainedTokenizerBase | str | None,
        lr: float | None,
        optimizer: OptimizerCallable | None,
        schedule: Schedule,
        *,
        default_lr: float,
        **deciding: Any,
    ) -> None:
        super().__init__()
        source = as_source(model)
        optimizer = chosen_optimizer(optimizer, lr, default=default_lr)
        keep_hyperparameters(self, tokenizer=tokenizer, lr=lr)
        self.tokenizer = find_tokenizer(source, tokenizer)
        self.model: PolicyModel | ScalarModel = None  # type: ignore[assignment]  # until `configure_model`
        self.optimizer = picklable(optimizer)
        self.schedule = schedule
        self._step = StepMean()
        self._changed: list[Difference] = []
        self._source = (source,)  # in a tuple, so that a built module is not registered twice
        self._settings = settings(optimizer, model=source, schedule=schedule, **deciding)

    def _build(self, source: ModelSource | nn.Module) -> PolicyModel | ScalarModel:
        """Build the network from its source."""
        raise NotImplementedError

    def _build_frozen(self) -> list[nn.Module]:
        """Build the networks beside it that are not trained."""
        return []

    @built_whole
    def configure_model(self) -> None:
        """Build the network once and shard it if the strategy asks for it."""
        if not self.model:
            refuse_finder(self)
            self.model = self._build(self._source[0])
            shard_networks(self, [self.model, *self._build_frozen()])

    def on_train_start(self) -> None:
        """Apply a learning rate that differs from the resumed checkpoint's."""
        begin_training(self, self._changed)

    def step_loss(self, total: Tensor, count: Tensor, *, rows: int) -> Tensor:
        """Return a batch's share of the step's mean loss and log the mean.

        Args:
            total: Σ loss of this process's batch, scalar.
            count: elements of it that count, scalar.
            rows: rows of the batch.
        """
        loss = self._step.loss(self, total, Ranks(self).sum(count))
        self.log("train/loss", self._step.mean.to(loss), prog_bar=True, batch_size=rows)
        self.log("lr", learning_rate(self))
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the count of all accumulated batches."""
        self._step.finish(optimizer)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """Build the optimizer and its schedule."""
        return scheduled(self.optimizer(trainable(self.model)), self.schedule, lambda: training_steps(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the settings of the run."""
        checkpoint["rlhf"] = {"module": self.kind, "settings": self._settings, "version": version()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise if the checkpoint belongs to a run with other settings."""
        self._changed = check_resumable(self, checkpoint, self._settings)

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write a Hugging Face folder for the next stages; a reward model's config holds the bias.

        Args:
            folder: written whole or not at all.
            merge_adapter: fold a LoRA adapter into the weights.
            dtype: of the weights in the folder; None is that in which they were trained.
        """
        self.configure_model()
        self.model.save_pretrained(folder, merge_adapter=merge_adapter, dtype=dtype)


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
