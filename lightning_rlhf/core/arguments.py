"""Check of arguments against their annotations: a class or a name where an object is needed is an error at once."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Real
from typing import Any


def check_fields(instance: Any) -> None:
    """Raise TypeError unless every field of a dataclass is of its annotated type."""
    check_arguments(type(instance), {field.name: getattr(instance, field.name) for field in fields(instance)})


def check_arguments(kind: type, values: Mapping[str, Any]) -> None:
    """Raise TypeError unless every value is of the type that a constructor's argument is annotated with.

    Args:
        kind: whose constructor.
        values: arguments by name; those that it has not are left alone.
    """
    hints = hints_of(kind)
    for name, value in values.items():
        if name in hints and not _conforms(value, hints[name]):
            raise TypeError(f"`{name}` must be {_named(hints[name])}: got {_told(value)}")


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the annotations of a constructor's arguments, those of a dataclass from all its bases."""
    return typing.get_type_hints(kind if is_dataclass(kind) else kind.__init__)  # type: ignore[misc]


def _conforms(value: Any, hint: Any) -> bool:
    """Return True if a value may be of an annotation; what cannot be told is True."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_conforms(value, each) for each in inner)
    if origin is typing.Literal:
        return value in inner
    if hint in (None, type(None)):
        return value is None
    if origin is Callable or hint is Callable:
        return callable(value)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if origin is not None and inspect.isclass(origin):
        is_sequence = issubclass(origin, Sequence)
        fits = isinstance(value, list | tuple if is_sequence else origin)
        return fits and (not is_sequence or all(_conforms(each, inner[0]) for each in value))
    return not inspect.isclass(hint) or isinstance(value, hint)


def _named(hint: Any) -> str:
    """Return an annotation in words."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(each) for each in inner)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin is Callable:
        return "a function"
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return f"a list of {_named(inner[0])}"
    return "None" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))


def _told(value: Any) -> str:
    """Return what a value is, and what to write where that is likely."""
    if inspect.isclass(value):
        return f"the class {value.__name__}, not an object: write {value.__name__}()"
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"{type(value).__name__} {value!r}"[:200]
