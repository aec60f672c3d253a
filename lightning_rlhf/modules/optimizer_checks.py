"""Checks of an optimizer before its first step."""

from __future__ import annotations

import inspect
import logging
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lightning_rlhf.core.settings import Difference
from lightning_rlhf.modules.optim import retune

logger = logging.getLogger(__name__)


def picklable(build: OptimizerCallable) -> OptimizerCallable:
    """Return the optimizer's class with its arguments, instead of this library's default lambda."""
    if not getattr(build, "__module__", "").startswith("lightning_rlhf.") or isinstance(build, partial):
        return build
    example = build([nn.Parameter(torch.zeros(1))])
    parameters = inspect.signature(type(example)).parameters
    return partial(type(example), **{name: value for name, value in example.defaults.items() if name in parameters})


def refuse_trainer_settings(module: LightningModule) -> None:
    """Raise if the trainer clips or accumulates gradients for a module that does so itself.

    Raises:
        ValueError: the trainer clips or accumulates gradients.
    """
    trainer = module.trainer
    instead = {
        "gradient_clip_val": "`updates.max_grad_norm` (--model.updates.max_grad_norm), 1.0 by default",
        "accumulate_grad_batches": "`batch_size` of the data and `updates.microbatch_tokens`, which bounds the memory",
    }
    if trainer.state.fn != "fit" or module.automatic_optimization:
        return
    for name, setting in instead.items():
        value = getattr(trainer, name)
        if value not in (None, 0, 1) or (name == "gradient_clip_val" and value):
            raise ValueError(f"`trainer.{name}`={value} is not of PPO, whose step is a rollout: set {setting}")


def refuse_finder(module: LightningModule) -> None:
    """Raise if Lightning would search for a learning rate: it sets an attribute that no module reads.

    Raises:
        ValueError: the trainer has a `LearningRateFinder`, as a callback or through its Tuner.
    """
    trainer = module._trainer
    if trainer is not None and any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
        raise ValueError(
            "LearningRateFinder cannot set this module's learning rate, which is its optimizer's: leave it out, and "
            "compare short runs with other values of `optimizer` (--model.optimizer.lr)"
        )


def begin_training(module: LightningModule, changed: list[Difference]) -> None:
    """Apply today's settings to a resumed optimizer and warn of weights too coarse for the learning rate.

    Args:
        module: about to train, in `on_train_start`.
        changed: settings that the checkpoint has otherwise.
    """
    if changed:
        retune(module)
    if not isinstance(module.trainer.strategy, DeepSpeedStrategy):  # whose optimizer keeps float32 weights of its own
        for group in module.trainer.optimizers[0].param_groups:
            _warn_of_coarse_weights(group)


def _warn_of_coarse_weights(group: dict[str, Any]) -> None:
    """Warn if most half-precision weights are further from their neighbors than twice the learning rate.

    Because an update of Adam is about as large as the learning rate, and one below half of that distance rounds away.
    """
    halves = [p for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
    if not halves:
        return
    rate = group["initial_lr"]
    shards = [getattr(p, "_local_tensor", p).detach().flatten()[:10_000] for p in halves]
    spacing = torch.cat(shards).abs().float() * torch.finfo(halves[0].dtype).eps
    lost = float((spacing > 2 * rate).float().mean()) if len(spacing) else 0.0
    if lost > 0.5:
        logger.warning(
            "%.0f %% of the %s weights are too coarse for steps of about %g, the learning rate, which round away: most "
            "of the model will not train; take `trainer.precision: bf16-mixed`, or a larger learning rate",
            100 * lost,
            str(halves[0].dtype).removeprefix("torch."),
            rate,
        )
