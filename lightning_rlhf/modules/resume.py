"""Whether a checkpoint is of this run: training goes on only where what decides its numbers is what it was."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lightning_rlhf.core.settings import described, refuse_differences

FREE = ("microbatch", "microbatch_tokens", "slots")
"""Settings that change memory and speed, never the result."""


def reward_settings(reward: object) -> dict[str, Any]:
    """A reward as plain values: its class and its public attributes, a function by its name."""
    public = {name: described(value) for name, value in vars(reward).items() if not name.startswith("_")}
    return {"class": type(reward).__qualname__} | public


def settings(optimizer: OptimizerCallable, **arguments: Any) -> dict[str, Any]:
    """Arguments of a module as plain values, with the optimizer's class and defaults; those that are free are left out.

    Args:
        optimizer: a function of the parameters.
        arguments: those that must agree, by name, as they are before training moves any.
    """
    found: dict[str, Any] = described(arguments)
    for value in found.values():
        for name in FREE if isinstance(value, dict) else ():
            value.pop(name, None)
    example = optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    return found | {"optimizer": {"class": type(example).__qualname__} | described(example.defaults)}


def check_resumable(module: LightningModule, checkpoint: dict[str, Any], now: dict[str, Any]) -> None:
    """Nothing, unless training is to go on from a checkpoint of another run.

    Args:
        module: about to load it.
        checkpoint: as loaded.
        now: the module's `settings`.

    Raises:
        ValueError: settings, names or shapes of parameters differ; all differences are listed.
    """
    trainer = module._trainer
    if trainer is None or trainer.state.fn != "fit":
        return
    before = checkpoint.get("rlhf", {}).get("settings")
    if before is not None:
        refuse_differences(before, now, of="configuration")
    if not trainer.strategy.restore_checkpoint_after_setup:  # else the module holds shards by now
        refuse_differences(_shapes(checkpoint["state_dict"]), _shapes(module.state_dict()), of="model")


def _shapes(state: dict[str, Any]) -> dict[str, str]:
    return {name: str(list(value.shape)) for name, value in state.items() if isinstance(value, Tensor)}
