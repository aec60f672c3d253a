"""Settings as plain values, so that those of a checkpoint can be compared with today's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any


def described(setting: Any) -> Any:
    """A setting as numbers, texts, lists and dictionaries: objects by their class and what they say of themselves.

    That is what their method `identity` returns, or else the fields of a dataclass. What keeps its value to itself,
    such as a function, is known by its name alone.
    """
    if isinstance(setting, Enum):
        return described(setting.value)
    if setting is None or isinstance(setting, bool):
        return setting
    for kind in (int, float, str):  # a subclass would need pickle in a checkpoint
        if isinstance(setting, kind):
            return kind(setting)
    if isinstance(setting, Mapping):
        return {str(key): described(value) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [described(value) for value in setting]
    if isinstance(setting, set | frozenset):
        return sorted(str(value) for value in setting)
    if not isinstance(setting, type) and callable(identity := getattr(setting, "identity", None)):
        return {"class": type(setting).__qualname__} | described(identity())
    if is_dataclass(setting) and not isinstance(setting, type):
        values = {field.name: described(getattr(setting, field.name, None)) for field in fields(setting)}
        return {"class": type(setting).__qualname__} | values
    return getattr(setting, "__qualname__", type(setting).__qualname__)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Where two described settings differ, each as `name: … before, … now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            absent = "nothing"
            yield from differences(before.get(key, absent), now.get(key, absent), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name}: {before!r} before, {now!r} now"


def refuse_differences(before: Any, now: Any, *, of: str) -> None:
    """Nothing, where two described settings agree.

    Args:
        before: the checkpoint's.
        now: today's.
        of: whose settings, for the error.

    Raises:
        ValueError: they differ; all differences are listed.
    """
    found = list(differences(before, now))
    if found:
        raise ValueError(
            f"the checkpoint is of another run: its {of} differs in\n  " + "\n  ".join(found) + "\nresume with the "
            "checkpoint's, or start a new run: leave out --ckpt_path and take another folder for checkpoints"
        )
