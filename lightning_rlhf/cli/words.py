"""Rewriting of a command line before parsing: shipped configs by name, order of configs and `--run`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lightning_rlhf.cli.configs import path_of

CONFIG = ("--config", "-c")
COMMANDS = ("fit", "validate", "test", "predict")
SHORT = {"--run": "--trainer.default_root_dir"}
"""Long flags by short flag."""
CLASSES = ("--model", "--data")
"""Flags that are read before the configs too, so that a config may hold arguments of the class that they name."""
METHOD = "--model.algorithm"
OPTIMIZER = ".optimizer"


def expanded(words: Sequence[str]) -> list[str]:
    """Return the words as jsonargparse needs them: shipped configs by path, all configs before the other flags.

    jsonargparse reads from left to right, and a later config would win over an earlier flag.

    Raises:
        ValueError: a config is no file, and none of that name is shipped; a class is given by a file, or an adapter by
            one of its arguments.
    """
    start = next((place + 1 for place, word in enumerate(words) if word in COMMANDS), 0)
    classes: list[str] = []
    configs: list[str] = []
    others: list[str] = []
    for flag, value in _pairs(words[start:]):
        if flag in CONFIG and value is not None:
            configs.append(f"--config={path_of(value)}")
        else:
            long = SHORT.get(flag, flag)
            classes += [f"{flag}={value}"] if flag in CLASSES else []
            others += [long] if value is None else [*_cleared(long, value), f"{long}={_of_torch(long, value)}"]
    _refuse_files(others)
    _refuse_parts_of_adapters(others)
    return [*words[:start], *classes, *configs, *others]


def _of_torch(flag: str, value: str) -> str:
    """Return the dotted path of torch's optimizer of a name that other packages use too."""
    if not flag.endswith(OPTIMIZER):
        return value
    import torch  # slow, and only for this

    return f"torch.optim.{value}" if isinstance(getattr(torch.optim, value, None), type) else value


def _refuse_files(words: Sequence[str]) -> None:
    """Raise ValueError if a class or function is given by a file."""
    for flag, value in re.findall(r"--(model[\w.]*)[= ](\S+)\.py(?:\s|$)", " ".join(words)):
        module = value.strip("./").replace("/", ".")
        raise ValueError(f"`{flag}`: {value}.py is a file: name what is in it by module and name, {module}.NAME")


def _refuse_parts_of_adapters(words: Sequence[str]) -> None:
    """Raise ValueError if an argument of an adapter stands alone: jsonargparse would take its words for the adapter."""
    for word in words:
        part = re.match(r"--(model\.\w+\.peft)\.[\w.]+", word)
        if part is not None:
            whole = """'{"class_path": "peft.LoraConfig", "init_args": {"r": 16}}'"""
            raise ValueError(f"`{part[0]}`: an adapter is given as a whole, in a config or by --{part[1]}={whole}")


def configs_of(words: Sequence[str]) -> list[str]:
    """Paths of the configs in an expanded command line."""
    return [word.removeprefix("--config=") for word in words if word.startswith("--config=")]


def _cleared(flag: str, value: str) -> list[str]:
    """Return a flag that resets a config's algorithm before a method is named.

    Otherwise the parts that the config lists would stay, and `--config ppo --model.algorithm=GRPO` be the bandit.
    """
    return [f"{METHOD}=null"] if flag == METHOD and value.rpartition(".")[2].isidentifier() else []


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the flags that are rewritten with their values; all other words alone."""
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in (*CONFIG, *SHORT, *CLASSES, METHOD) and not flag.endswith(OPTIMIZER):
            yield word, None
        elif equals:
            yield flag, value
        else:
            yield flag, next(rest, None)
