"""Entry point of `lightning-rlhf COMMAND`, cheap to import because only `main` imports Lightning."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

TOOLS = {
    "completion": "lightning_rlhf.cli.completion",
    "configs": "lightning_rlhf.cli.configs",
    "report": "lightning_rlhf.report.command",
    "rescore": "lightning_rlhf.cli.rescore",
    "serve": "lightning_rlhf.cli.serve",
}
"""Modules of the commands beside Lightning's, whose `main` takes the arguments after the command."""


COMMANDS = {
    "fit": "train: supervised fine-tuning, a reward model, or reinforcement learning",
    "validate": "evaluate a model on the held-out data of `--data.val`",
    "test": "evaluate a model on the data of `--data.test`",
    "predict": "write responses to the prompts of `--data.predict`",
    "configs": "list the shipped configs, or print one",
    "report": "make one page of a run, or of several beside each other",
    "rescore": "score the responses of a run by another reward",
    "serve": "start a vLLM server that a run samples on",
    "completion": "print a script for the shell's tab key",
}
"""Commands with their help."""
HELP = """usage: lightning-rlhf COMMAND [--config NAME_OR_FILE] [--run FOLDER] [--KEY VALUE ...]

{commands}

  lightning-rlhf fit --config ppo --model.policy MODEL --model.reward my_rewards.brevity --data.train prompts.jsonl
  lightning-rlhf COMMAND --help
  lightning-rlhf --version
"""


def main(args: Sequence[str] | None = None) -> Any:
    """Run the command line (or `args`) and return the CLI object with its `trainer` and `model`.

    The commands in `TOOLS` return nothing.

    Raises:
        SystemExit: the command line or a config is not valid; the reason is on stderr.
        Exception: any other failure; `console` makes a sentence of it.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given == ["--version"]:
        print(f"lightning-rlhf {version('lightning-rlhf')}")
        return None
    if given in ([], ["-h"], ["--help"]):
        text = HELP.format(commands="\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items()))
        print(text, end="", file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    if given and given[0] in TOOLS:
        return import_module(TOOLS[given[0]]).main(given[1:])
    from lightning_rlhf.cli.command import RLHFCLI

    return RLHFCLI(args=None if args is None else given)


def console() -> None:
    """Console script, which imports your modules from the working directory like `python -m`.

    Raises:
        SystemExit: 2 where the command line or a config was refused, 1 where data or a model was; the reason, one
            sentence, is on stderr. A bug keeps its traceback.
    """
    sys.path.insert(0, os.getcwd())  # not "": jsonargparse changes into the folder of a config
    try:
        main()
    except Exception as error:
        from lightning_rlhf.cli.failure import sentence, status

        message = sentence(error)
        if message is None:
            raise
        print(f"lightning-rlhf: error: {message}", file=sys.stderr)
        raise SystemExit(status(error)) from None
