"""YAML reader that refuses duplicate keys and endless values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lightning_rlhf.cli.words import METHOD, configs_of

LARGEST = 10_000
"""Values of a document, aliases written out: far more than any config has."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load = get_loader("yaml")


def load(text: str) -> Any:
    """Parse a YAML text to the value that jsonargparse reads.

    Raises:
        YAMLError: it is no YAML; a key stands twice in one mapping; it has too many values, as where an alias stands
            inside what it names.
    """
    try:
        _check(yaml.compose(text, Loader=_Loader))
        return _load(text)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def _check(root: Node | None) -> None:
    nodes, seen = [root], 0
    while nodes:
        node, seen = nodes.pop(), seen + 1
        if seen > LARGEST:
            raise yaml.YAMLError(f"it has more than {LARGEST} values: an alias contains itself, or repeats too often")
        if isinstance(node, SequenceNode):
            nodes += node.value
        elif isinstance(node, MappingNode):
            _check_keys(node)
            nodes += [part for pair in node.value for part in pair]


def _check_keys(node: MappingNode) -> None:
    keys: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, ScalarNode) and key.value != "<<"):
        if key.value in keys:
            line = key.start_mark.line + 1
            raise yaml.YAMLError(f"the key `{key.value}` stands twice, again in line {line}: keep one of them")
        keys.add(key.value)


def replaced_callbacks(words: Sequence[str]) -> list[str]:
    """List the callbacks of configs that are lost because a later `trainer.callbacks` replaces the list.

    Args:
        words: of the command line, after `words.expanded`.
    """
    listed: list[str] = []
    replaced: list[str] = []
    for path in configs_of(words):
        trainer = _value(path, "trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        if isinstance(trainer.get("callbacks"), list):
            now = [_name(callback) for callback in trainer["callbacks"]]
            replaced = [*replaced, *(name for name in listed if name not in now)]
            listed = now
        more = trainer.get("callbacks+")
        listed = [*listed, *(_name(callback) for callback in (more if isinstance(more, list) else []))]
    return [name for name in dict.fromkeys(replaced) if name not in listed]


def with_methods(words: Sequence[str]) -> list[str]:
    """Insert a flag that takes the algorithm back before each config that names another method.

    Otherwise the parts that an earlier config lists would stay under its name.

    Args:
        words: of the command line, after `words.expanded`.
    """
    cleared: list[str] = []
    before = ""
    for word in words:
        for path in configs_of([word]):
            algorithm = _value(path, "model", "init_args", "algorithm")
            method = _name(algorithm) if algorithm else ""
            if before and method and method != before:
                cleared.append(f"{METHOD}=null")
            before = method or before
        cleared.append(word)
    return cleared


def _value(path: str, *keys: str) -> Any:
    """Read a value of a config by its keys; None if it has none or is unreadable, which the parser reports."""
    try:
        value = load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _name(callback: Any) -> str:
    """Return the last word of the class that a value names; empty if it names none."""
    path = callback.get("class_path", "") if isinstance(callback, dict) else callback
    return str(path).rpartition(".")[2]
