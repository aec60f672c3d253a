"""The LightningCLI of this library."""

from __future__ import annotations

from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import lightning_rlhf.callbacks
import lightning_rlhf.core
import lightning_rlhf.data
import lightning_rlhf.modules
import lightning_rlhf.rollout
from lightning_rlhf.callbacks import PredictionWriter

ROOMS = (
    lightning_rlhf.core,
    lightning_rlhf.rollout,
    lightning_rlhf.data,
    lightning_rlhf.modules,
    lightning_rlhf.callbacks,
)
"""Imported, so that their classes can be named in YAML by one word."""


class RLHFCLI(LightningCLI):
    """Any of our modules with any of our data modules, or your own, by `class_path`.

    Args:
        args: the command line; None reads it from the process.
    """

    def __init__(self, args: Any = None) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--predictions.path` says where `predict` writes."""
        parser.add_lightning_class_args(PredictionWriter, "predictions")
