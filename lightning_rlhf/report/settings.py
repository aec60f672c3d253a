"""Settings of a run, as dotted keys and short texts: what to compare runs by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NOISE = ("trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "config")
"""Beginnings of keys that say where a run wrote, not what it did."""
LARGEST = 10_000
"""Values of a config, far more than any has."""


def read_settings(configs: Sequence[Path], hparams: Sequence[Path] = ()) -> dict[str, str]:
    """Read the last `config.yaml`, or what `hparams.yaml` has of the module where there is none.

    Raises:
        ValueError: the config is no YAML mapping; hparams, which any module writes, are passed over instead.
    """
    if configs:
        return _read(configs[-1])
    try:
        found = _read(hparams[-1]) if hparams else {}
    except ValueError:
        return {}
    return {f"model.{key}": value for key, value in found.items() if not key.startswith("_")}


def _read(path: Path) -> dict[str, str]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_size(found)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is no YAML ({reason}): restore it, or remove it to go on without") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings but {type(found).__name__}: remove it to go on without")
    return {key: value for key, value in _flat(found) if not key.startswith(NOISE)}


def _check_size(value: Any) -> None:
    """Refuse a value that, with what it holds, is larger than any config.

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
    """Each value under its dotted key, a class as its name with its arguments below."""
    if not isinstance(value, dict) or not value:
        return [(key, _text(value))]
    if "class_path" in value:
        arguments = value.get("init_args") or {}
        return [(key, _text({"class_path": value["class_path"]})), *(_flat(arguments, key) if arguments else ())]
    return [pair for name, inner in value.items() for pair in _flat(inner, f"{key}.{name}" if key else str(name))]


def _text(value: Any) -> str:
    """A value in a line, a class as the call that makes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    name, arguments = str(value["class_path"]).rpartition(".")[2], value.get("init_args")
    if not isinstance(arguments, dict) or not arguments:
        return name
    return f"{name}({', '.join(f'{key}={_text(inner)}' for key, inner in arguments.items() if inner is not None)})"
