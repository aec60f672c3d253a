"""Help on a few screens: a short usage, the trainer's common arguments and this library's classes."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterable
from typing import Any

from jsonargparse import DefaultHelpFormatter

from lightning_rlhf.cli.words import COMMANDS

COMMON: tuple[str, ...] = ("accelerator", "strategy", "devices", "num_nodes", "precision", "logger", "callbacks")
COMMON += ("fast_dev_run", "max_epochs", "max_steps", "limit_train_batches", "limit_val_batches", "val_check_interval")
COMMON += ("default_root_dir",)
"""Arguments of the trainer that the help explains."""
OPTIONAL = "null leaves it out."
"""End of the help of a key whose value may be null."""
ABSENT = ("weights_only",)
"""Arguments that a user of the command line has no choice in."""
SAID = {
    "ckpt_path": "Checkpoint to go on from: a path, or `last` for the newest of the run's folder.",
    "seed_everything": "Seed of sampling, data order and new weights. (default: 0)",
    "trainer.default_root_dir": "Folder of the run: its model, checkpoints, logs and samples. Short: --run.",
    "trainer.logger": "A CSVLogger in the run's folder unless another is named, such as WandbLogger.",
}
"""Help that replaces Lightning's own."""
SECTIONS = {"<class 'lightning.": "Model", "A DataModule": "Data", "Customize every aspect": "Lightning's Trainer"}
SECTIONS |= {"Runs the full": "Checkpoint", "Perform one evaluation": "Checkpoint", "Run inference": "Checkpoint"}
EPILOG = """Examples:
  lightning-rlhf fit --config ppo --model.policy MODEL --model.reward my_rewards.brevity --data.train prompts.jsonl
  lightning-rlhf fit --config grpo --run runs/grpo-2 --seed_everything 2 --ckpt_path last ...
  lightning-rlhf fit --config ppo --config strategy/fsdp2 --model.algorithm.surrogate=KLPen ... --print_config

More help: `fit --model.help PPOModule` and `fit --data.help PromptDataModule` for their arguments,
`fit --model PPOModule --model.algorithm.help GRPO` for a class, `lightning-rlhf configs` for the shipped configs.
All arguments of Lightning's Trainer can be given as --trainer.NAME."""


class HelpFormatter(DefaultHelpFormatter):
    """Help formatter that omits rare arguments."""

    def add_usage(self, usage: str | None, actions: Iterable[Action], *args: Any, **options: Any) -> None:
        """Show one line instead of every flag for a command, and none for a class."""
        command = self._prog.split()[-1]
        short = f"lightning-rlhf {command} [--config NAME_OR_FILE] [--run FOLDER] [--KEY VALUE ...]"
        super().add_usage(short if command in COMMANDS else SUPPRESS, actions, *args, **options)

    def start_section(self, heading: str | None) -> None:
        """Rename a section by its content."""
        named = [name for opening, name in SECTIONS.items() if (heading or "").startswith(opening)]
        super().start_section(named[0] if named else heading)

    def add_argument(self, action: Action) -> None:
        """Leave out rare arguments of the trainer and the help flags of single keys."""
        group, _, name = action.dest.partition(".")
        of_a_key = any(flag.endswith(".help") for flag in action.option_strings)
        if (group != "trainer" or name in COMMON) and not of_a_key and action.dest not in ABSENT:
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        if action.dest in SAID:
            return SAID[action.dest]
        if str(action.help).endswith(OPTIONAL):
            return str(action.help)
        text = super()._get_help_string(action)
        return re.sub(r"known subclasses: ([^)]*)", lambda match: _ours(match[1]), text)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Keep the line breaks of a text that has some."""
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _ours(classes: str) -> str:
    """Return the one-word names of this library's classes among those that jsonargparse knows."""
    every = classes.split(", ")
    names = [name.rpartition(".")[2] for name in every if name.startswith("lightning_rlhf.")]
    wanted = names and "torch.nn.Module" not in every
    return f"classes: {', '.join(names)}" if wanted else "or a class by its dotted path"
