"""The LightningCLI of this library."""

from __future__ import annotations

import warnings
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_rlhf.callbacks
import lightning_rlhf.core
import lightning_rlhf.data
import lightning_rlhf.modules
import lightning_rlhf.rollout
from lightning_rlhf.callbacks import PredictionWriter
from lightning_rlhf.parser import Parser

ROOMS = (
    lightning_rlhf.core,
    lightning_rlhf.rollout,
    lightning_rlhf.data,
    lightning_rlhf.modules,
    lightning_rlhf.callbacks,
)
"""Imported, so that their classes can be named in YAML by one word."""


class SaveFitConfig(SaveConfigCallback):
    """Keeps the config of a training run beside its logs; evaluating a model writes none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it if there is something to train and a logger to say where."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class RLHFCLI(LightningCLI):
    """Any of our modules with any of our data modules, or your own, by `class_path`.

    Args:
        args: the command line; None reads it from the process.
    """

    def __init__(self, args: Any = None) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        # transformers' networks come in eval mode and stay there: dropout is off in all three stages
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message=r".*Total length of `list` across ranks is zero.*")  # no `val`
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False},
            args=args,
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: what is on the command line holds, also beside a checkpoint that remembers other arguments."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`--predictions.path` says where `predict` writes."""
        parser.add_lightning_class_args(PredictionWriter, "predictions")
