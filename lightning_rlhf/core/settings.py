"""Settings as plain values, for a comparison with those of a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from inspect import ismethod
from typing import Any, NamedTuple


def seed_of_run(seed: int | None) -> int:
    """Return the given seed, or that of Lightning's `seed_everything` if it is None."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


logger = logging.getLogger(__name__)

ABSENT = "nothing"
"""Value of a setting that one side lacks."""


def described(setting: Any) -> Any:
    """Describe a setting as plain values, with objects by class and identity.

    The plain values are numbers, texts, lists and dictionaries. The identity of an object is the result of its method
    `identity`, or else the fields of a dataclass; that of a `functools.partial`, which a config makes of a factory, its
    function and arguments; that of a method, its object. Anything else, such as a function, is known by its name alone.
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
    if isinstance(setting, partial):
        return _described_call(setting)
    if ismethod(setting):
        return {"class": setting.__qualname__, "of": described(setting.__self__)}
    return getattr(setting, "__qualname__", type(setting).__qualname__)


def _described_call(setting: partial[Any]) -> dict[str, Any]:
    """Describe a function with some of its arguments; if jsonargparse made it, the class that it builds."""
    parts = [setting.func, *setting.args]
    while getattr(parts[0], "__module__", "").startswith("jsonargparse."):
        parts.pop(0)
    called, *arguments = map(described, parts)
    values = described(setting.keywords)
    return {"class": called} | ({"arguments": arguments} if arguments else {}) | values


class Difference(NamedTuple):
    """Setting in which a checkpoint and a run differ.

    Attributes:
        name: of the setting, outer names first, with dots between.
        before: the checkpoint's, `ABSENT` if it has none.
        now: the run's, `ABSENT` if it has none.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        """Format the difference on one line."""
        return f"{self.name}: {self.before!r} before, {self.now!r} now"

    @property
    def is_number(self) -> bool:
        """True if both values are numbers, texts or None and no classes."""
        return not self.name.endswith("class") and all(_is_plain(value) for value in (self.before, self.now))

    @property
    def is_new(self) -> bool:
        """True if one side lacks the setting, as another version of this library does."""
        return ABSENT in (self.before, self.now)


def differences(before: Any, now: Any, name: str = "") -> Iterator[Difference]:
    """Yield the differences of two described settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key, ABSENT), now.get(key, ABSENT), f"{name}.{key}" if name else key)
    elif before != now:
        yield Difference(name, before, now)


def accept_differences(
    before: Any, now: Any, *, of: str, is_future: Callable[[Difference], bool], writer: str | None = None
) -> list[Difference]:
    """Return the differences that change only the future of a run and raise for any other.

    Args:
        before: the checkpoint's settings, described.
        now: today's.
        of: whose settings, for the error.
        is_future: whether a run can go on with a difference.
        writer: version of this library that wrote the checkpoint.

    Returns:
        those with which the run goes on, which a warning lists.

    Raises:
        ValueError: others, too; all are listed.
    """
    changes = list(differences(before, now))
    accepted = [difference for difference in changes if difference.is_new or is_future(difference)]
    if len(accepted) < len(changes):
        version = f", written by version {writer}" if writer else ""
        raise ValueError(
            f"the checkpoint is of another run{version}: its {of} differs in\n  "
            + "\n  ".join(map(str, changes))
            + "\nresume with the checkpoint's, or start a new run: leave out --ckpt_path and take another folder for "
            "checkpoints"
        )
    if accepted:
        logger.warning(
            "the run goes on, though its %s differs from the checkpoint's, and so not as it would have:\n  %s",
            of,
            "\n  ".join(map(str, accepted)),
        )
    return accepted


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(x, bool | int | float | str | None) for x in values)
