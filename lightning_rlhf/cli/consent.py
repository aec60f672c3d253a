"""Settings that a config file may not make: to run a model's code, load pickles or fetch a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_YES = ("true", "yes", "1")


def objection(config: Mapping[str, Any], arguments: Sequence[str]) -> str | None:
    """Describe why the parsed config must not run; returns None if it may.

    `trust_remote_code` has to be typed by whoever starts the run, under the very name of the argument it is for: then a
    config that was downloaded, or written by an earlier run, turns nothing on. `weights_only: false` has no flag.
    A `ckpt_path` that is an address has to be typed as well.

    Args:
        config: of a subcommand, defaults, files and flags together, as nested mappings.
        arguments: of the command line.
    """
    typed = _typed(arguments)
    for name, value in _leaves(config, ()):
        if name[-1] == "weights_only" and value is False:
            return "`weights_only`: checkpoints are loaded without pickle, which could run code: leave it out"
        if name == ("ckpt_path",) and "://" in str(value) and not any(str(value) in word for word in arguments):
            return f"`ckpt_path`: a config file can't ask the network for {value}: type it, --ckpt_path={value}"
        flag = "--" + ".".join(part for part in name if part not in ("init_args", "dict_kwargs"))
        if name[-1] == "trust_remote_code" and value and flag not in typed:
            return (
                "`trust_remote_code` is no matter of a config file: if you have read the code that comes with the "
                f"model, say so on the command line, {flag}=true"
            )
    return None


def _typed(arguments: Sequence[str]) -> set[str]:
    """Collect the flags that the command line sets to true."""
    flags = set()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if (value if equals else following).lower() in _YES:
            flags.add(flag.replace(".init_args.", ".").replace(".dict_kwargs.", "."))
    return flags


def _leaves(value: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*name, str(key)))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*name, str(place)))
    elif name:
        yield name, value
