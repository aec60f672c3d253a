"""`config.yaml` of a run, as dotted keys and short texts: what to compare runs by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NOISE = ("trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "config")
"""Beginnings of keys that say where a run wrote, not what it did."""
LARGEST = 10_000
"""Values of a config, far more than any has."""


def read_settings(paths: Sequence[Path]) -> dict[str, str]:
    """The settings of the last of some files; nothing where there is no file.

    Raises:
        ValueError: it is no YAML mapping.
    """
    if not paths:
        return {}
    try:
        found = yaml.safe_load(paths[-1].read_text(encoding="utf-8"))
        _check_size(found)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{paths[-1]} is no YAML ({reason}): restore it, or remove it to go on without") from error
    if not isinstance(found, dict):
        raise ValueError(f"{paths[-1]} holds no settings but {type(found).__name__}: remove it to go on without")
    return {key: value for key, value in _flat(found) if not key.startswith(NOISE)}


def _check_size(value: Any) -> None:
    """Return if a value, with what it holds, is of the size of a config.

    Raises:
        ValueError: it is larger, as where an alias contains itself or repeats too often.
    """
    values, seen = [value], 0
    while values:
        inner, seen = values.pop(), seen + 1
        if seen > LARGEST:
            raise ValueError(f"more than {LARGEST} values, aliases written out")
        if isinstance(inner, dict):
            values += [*inner, *inner.values()]
        elif isinstance(inner, list | tuple | set):
            values += inner


def differing(settings: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Keys whose values differ between runs: key → a value for each run, "" where it has none.

    Args:
        settings: run → its settings; runs without any are not compared.
    """
    keys = dict.fromkeys(key for of_run in settings.values() for key in of_run)
    values = {key: [of_run.get(key, "") for of_run in settings.values()] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for name, inner in value.items() for pair in _flat(inner, f"{key}.{name}" if key else str(name))]
    short = key.replace(".init_args", "").replace(".class_path", "")
    return [(short, str(value).rpartition(".")[2] if key.endswith("class_path") else str(value))]
