"""Suggestions of the nearest names for a key or a class that the parser refuses."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

import lightning_rlhf.callbacks
import lightning_rlhf.core
import lightning_rlhf.data
import lightning_rlhf.engines
import lightning_rlhf.evaluation
import lightning_rlhf.models
import lightning_rlhf.modules
import lightning_rlhf.rewards
import lightning_rlhf.rollout
from lightning_rlhf.cli.standard import STANDARD
from lightning_rlhf.core.arguments import hints_of

NAMED: tuple[ModuleType, ...] = (
    lightning_rlhf.core,
    lightning_rlhf.engines,
    lightning_rlhf.rewards,
    lightning_rlhf.rollout,
    lightning_rlhf.data,
    lightning_rlhf.evaluation,
    lightning_rlhf.modules,
    lightning_rlhf.callbacks,
)
"""Subpackages whose classes are named in YAML by one word, once they are imported."""
PACKAGES = ("datasets", "deepspeed", "gguf", "matplotlib", "peft", "tensorboard", "trl", "wandb")
"""Packages that only some configs need."""
DEPTH = 4
"""Depth to which nested objects are searched."""


def suggestion(reason: str, key: str) -> str:
    """Return a question with the nearest names, or an empty text if none is near.

    Args:
        reason: of the parser, in plain words.
        key: of the argument whose value it refused, such as `model` or `model.algorithm`.
    """
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted", reason)
    if unknown is not None:
        return _of_key(unknown[1] or unknown[2], key)
    missing = re.search(r"No module named '(\w+)'", reason)
    if missing is not None:
        return f"pip install {missing[1]}" if missing[1] in PACKAGES else "its folder is neither here nor installed"
    unknown = re.search(r"there is no ([\w.]+)", reason)
    return "" if unknown is None else _of_class(unknown[1].rpartition(".")[2], key)


def _of_key(name: str, key: str) -> str:
    leaf = name.rpartition(".")[2]
    elsewhere = [path for path in keys() if path.rpartition(".")[2] == leaf]
    root = key.partition(".")[0]
    if f"{key}.{name}" in elsewhere:
        return f"name the class that it is of, --{root}=CLASS"
    if elsewhere and key:
        elsewhere = [path for path in elsewhere if path.startswith(root)] or elsewhere
        return f"`{leaf}` belongs to {_listed('--' + path for path in _outermost(elsewhere))}"
    leaves = {path.rpartition(".")[2]: path for path in keys() if not key or path.startswith(root)}
    near = get_close_matches(leaf, leaves, n=2, cutoff=0.7)
    return f"did you mean {_listed('--' + leaves[each] for each in near)}?" if near else ""


def _outermost(paths: list[str]) -> list[str]:
    """Return the paths that lie inside the fewest others, at most two."""
    fewest = min(path.count(".") for path in paths)
    return [path for path in paths if path.count(".") == fewest][:2]


def _of_class(name: str, key: str) -> str:
    classes = {each.__name__: each for each in _classes()}
    if name in classes:
        places = [path for path, kind in keys().items() if kind is not None and issubclass(classes[name], kind)]
        return f"it belongs to {_listed(f'--{path}={name}' for path in _outermost(places))}" if places else ""
    kind = keys().get(key)
    fitting = [each for each, named in classes.items() if kind is None or issubclass(named, kind)]
    near = get_close_matches(name, fitting, n=2, cutoff=0.6)
    if near:
        return f"did you mean {_listed(near)}?"
    return f"there are {', '.join(sorted(fitting))}" if kind is not None and len(fitting) <= 12 else ""


@cache
def keys() -> dict[str, type | None]:
    """All keys of the command line with the class of their value; None for plain values."""
    table: dict[str, type | None] = {}
    for root, base in {"model": LightningModule, "data": LightningDataModule}.items():
        table[root] = base
        for kind in _classes():
            if issubclass(kind, base):
                _add(table, root, kind, DEPTH)
    for key, (callback, _) in STANDARD.items():
        table[key] = None
        _add(table, key, callback, DEPTH)
    _add(table, "trainer", Trainer, 0)
    return table


def _add(keys: dict[str, type | None], path: str, kind: type, depth: int) -> None:
    for name, inner in _arguments(kind):
        place = f"{path}.{name}"
        keys.setdefault(place, inner)
        if inner is not None and depth:
            for each in _classes():
                if issubclass(each, inner) and each is not kind:
                    _add(keys, place, each, depth - 1)


def _arguments(kind: type) -> Iterator[tuple[str, type | None]]:
    """Arguments of a class, each with the class of this library that it takes."""
    hints = hints_of(kind)
    for name in inspect.signature(kind).parameters:
        ours = [each for each in _inside(hints.get(name)) if each.__module__.startswith("lightning_rlhf")]
        yield name, ours[0] if ours else None


def _inside(annotation: Any) -> Iterator[type]:
    """Classes in an annotation."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _inside(part)


@cache
def _classes() -> tuple[type, ...]:
    """Classes of this library that a config can name."""
    values = (getattr(module, name) for module in (*NAMED, lightning_rlhf.models) for name in module.__all__)
    return tuple(dict.fromkeys(value for value in values if inspect.isclass(value) and not inspect.isabstract(value)))


def _listed(names: Any) -> str:
    return " or ".join(f"`{name}`" for name in names)
