"""Settings of a run as dotted keys and short texts, to compare runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NOISE = ("trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "config")
"""Prefixes of keys with paths of a run, which are not compared."""
LARGEST = 10_000
"""Most values of a config, far more than any has."""


def read_settings(configs: Sequence[Path], hparams: Sequence[Path] = ()) -> dict[str, str]:
    """Read the last `config.yaml`, or the module's settings in `hparams.yaml` if there is none.

    Raises:
        ValueError: the config is no YAML mapping; invalid hparams, which any module writes, are skipped.
    """
    if configs:
        return _read(configs[-1])
    try:
        settings = _read(hparams[-1]) if hparams else {}
    except ValueError:
        return {}
    return {f"model.{key}": value for key, value in settings.items() if not key.startswith("_")}


def _read(path: Path) -> dict[str, str]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_size(config)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no YAML ({reason}): restore it, or remove it to go on without") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no settings but {type(config).__name__}: remove it to go on without")
    return {key: value for key, value in _flat(config) if not key.startswith(NOISE)}


def _check_size(value: Any) -> None:
    """Raise if a value has more nested values than any config.

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
    """Collect the keys whose values differ between runs, with "" for a run without a value.

    Args:
        settings: run → its settings; runs without any are not compared.
    """
    keys = dict.fromkeys(key for of_run in settings.values() for key in of_run)
    values = {key: [of_run.get(key, "") for of_run in settings.values()] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Flatten a config to dotted keys; a class is its name with its arguments below."""
    if not isinstance(value, dict) or not value:
        return [(key, _text(value))]
    if "class_path" in value:
        arguments = value.get("init_args") or {}
        return [(key, _text({"class_path": value["class_path"]})), *(_flat(arguments, key) if arguments else ())]
    return [pair for name, inner in value.items() for pair in _flat(inner, f"{key}.{name}" if key else str(name))]


def _text(value: Any) -> str:
    """Format a value in one line, a class as a call."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    name, arguments = str(value["class_path"]).rpartition(".")[2], value.get("init_args")
    if not isinstance(arguments, dict) or not arguments:
        return name
    return f"{name}({', '.join(f'{key}={_text(inner)}' for key, inner in arguments.items() if inner is not None)})"
