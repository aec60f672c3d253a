"""Hyperparameters in a checkpoint: plain values that load without pickle."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def keep_hyperparameters(module: LightningModule, **arguments: Any) -> None:
    """Save the CLI's config or else the arguments that are plain values as hyperparameters.

    Because live objects would be pickled, a checkpoint with them does not load under `weights_only=True`.

    Args:
        module: whose `hparams`.
        arguments: of its constructor, by name.
    """
    if _given_hyperparameters.get() is not None:
        module.save_hyperparameters()
    else:
        module.save_hyperparameters({name: value for name, value in arguments.items() if _is_plain(value)})


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
