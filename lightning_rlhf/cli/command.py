"""The LightningCLI of this library."""

from __future__ import annotations

import logging
import sys
from typing import Any

from jsonargparse import set_loader, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from yaml import YAMLError

from lightning_rlhf.cli.consent import objection
from lightning_rlhf.cli.documents import load, replaced_callbacks
from lightning_rlhf.cli.ending import numbers, predictions, results
from lightning_rlhf.cli.help import EPILOG
from lightning_rlhf.cli.messages import quiet, speak
from lightning_rlhf.cli.parser import Parser
from lightning_rlhf.cli.standard import STANDARD, add_standard, with_standard
from lightning_rlhf.cli.words import expanded
from lightning_rlhf.core import Algorithm, EntropyBonus
from lightning_rlhf.models.checkpoint import has_file, read_checkpoint
from lightning_rlhf.models.shards import guard

logger = logging.getLogger(__name__)


class SaveFitConfig(SaveConfigCallback):
    """Saves the config of a training run beside its logs, and none of an evaluation."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config if the command trains and a logger names the folder."""
        if stage == "fit" and trainer.loggers:
            super().setup(trainer, pl_module, stage)


class RLHFCLI(LightningCLI):
    """Command line for any module with any data module by `class_path`, this library's or your own.

    Args:
        args: the command line; None reads it from the process.
    """

    def __init__(self, args: Any = None) -> None:
        self._given = [str(word) for word in (sys.argv[1:] if args is None else args)]
        asked = any(word == "-h" or "help" in word or "comments" in word for word in self._given)
        set_parsing_settings(
            docstring_parse_attribute_docstrings=asked,  # from source files: slow, and for help alone
            config_read_mode_urls_enabled=False,
            config_read_mode_fsspec_enabled=False,  # Lightning's CLI lets any config name another one by its address
        )
        set_parsing_settings(subclasses_enabled=[Algorithm, EntropyBonus])  # concrete dataclasses with subclasses
        set_loader("yaml", load, exceptions=(YAMLError,))
        speak()
        quiet()
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # of this command line
        """Return the named subcommand alone, or all if none is named: each parser takes as long to build."""
        every = LightningCLI.subcommands()
        return {name: skipped for name, skipped in every.items() if name in self._given[:1]} or every

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line and refuse settings that a config file may not make (`consent`)."""
        try:
            replaced = replaced_callbacks(expanded(self._given))
        except ValueError as error:
            parser.error(str(error))
        if replaced:
            logger.warning(
                "a later config's `trainer.callbacks` replaces those of the one before: %s will not run; write "
                "`callbacks+:` to add to them",
                ", ".join(replaced),
            )
        try:
            super().parse_arguments(parser, args)
        except UnicodeDecodeError as error:
            parser.error(f"a config is no UTF-8 text: {error}")
        chosen = self.config[self.config.subcommand]
        refusal = objection(chosen.as_dict(), self._given)
        if refusal is not None:
            parser.error(refusal)
        chosen.weights_only = True
        if self.config.subcommand in ("validate", "test"):
            chosen.verbose = False  # Lightning's table; `_show` prints ours

    def before_instantiate_classes(self) -> None:
        """Check the checkpoint before anything is built, so that a wrong one costs no time.

        Raises:
            ValueError: it cannot exist, or is corrupt, pickled, or another module's.
        """
        chosen = self.config[self.config.subcommand]
        if not chosen.ckpt_path or not has_file(chosen.ckpt_path):
            return
        kept = read_checkpoint(chosen.ckpt_path).get("hyper_parameters", {}).get("_class_path", "")
        writer, reader = (name.rpartition(".")[2] for name in (str(kept), chosen.model.class_path))
        if writer and writer != reader:
            raise ValueError(
                f"`ckpt_path`: {chosen.ckpt_path} was written by {writer}, but the config has {reader}: give a "
                f"checkpoint of {reader}, or set `model` to {writer}"
            )

    def after_instantiate_classes(self) -> None:
        """Check a checkpoint that is a folder before it is loaded, also for modules of your own."""
        guard(self.trainer.strategy)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a subcommand.

        Raises:
            ValueError: the checkpoint's weights are those of another network.
        """
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            raise ValueError(
                f"`ckpt_path`: the checkpoint's weights are those of another network: {str(error)[:400]}"
            ) from error

    def after_fit(self) -> None:
        """Print the paths of the results."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._show(results(self.trainer))

    def after_predict(self) -> None:
        """Print the paths of the responses."""
        self._show(predictions(self.trainer))

    def after_validate(self) -> None:
        """Print the numbers with their meaning."""
        self._show(numbers(self.trainer.callback_metrics))

    def after_test(self) -> None:
        """Print the numbers with their meaning."""
        self._show(numbers(self.trainer.callback_metrics))

    def _show(self, text: str) -> None:
        if self.trainer.is_global_zero and text:
            print(f"\n{text}")

    def _parse_ckpt_path(self) -> None:
        """Disable Lightning's merging of checkpoint hyperparameters into the config."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the standard callbacks and the run's folder."""
        parser.epilog = EPILOG
        add_standard(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer with the standard callbacks and logger."""
        standard = [self._get(self.config_init, key) for key in STANDARD]
        trainer = {**self._get(self.config_init, "trainer"), **kwargs}
        present = [callback for callback in standard if callback is not None]
        return self._instantiate_trainer(with_standard(trainer, present, self.model), [])
