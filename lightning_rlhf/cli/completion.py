"""`lightning-rlhf completion SHELL`: a script for completion of commands, keys and shipped configs."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from lightning_rlhf.cli.configs import shipped

SCRIPT = """{zsh}_lightning_rlhf() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [ "$before" = "--config" ] || [ "$before" = "-c" ]; then
    COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word"))
  else
    COMPREPLY=($(compgen -W "{flags}" -- "$word"))
  fi
}}
complete -o default -o nospace -F _lightning_rlhf lightning-rlhf
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main(arguments: Sequence[str]) -> None:
    """Print the completion script of a shell."""
    parser = argparse.ArgumentParser(
        prog="lightning-rlhf completion",
        description="Print a script that completes the command line in a shell.",
        epilog='eval "$(lightning-rlhf completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(arguments).shell
    from lightning_rlhf.cli.console import COMMANDS
    from lightning_rlhf.cli.suggestions import keys

    flags = ["--config", "--run", "--seed_everything", "--ckpt_path", "--print_config", *(f"--{key}" for key in keys())]
    words: dict[str, Iterable[str]] = {"commands": COMMANDS, "configs": shipped(), "flags": flags}
    joined = {name: " ".join(values) for name, values in words.items()}
    print(SCRIPT.format(zsh=ZSH if shell == "zsh" else "", **joined), end="")
