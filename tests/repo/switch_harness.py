"""The switch test's machinery: which arguments there are, and whether one of them moves anything.

A new argument goes into its class's case, `argument=to(another value)`; `by=` observes it elsewhere than the class's
other arguments, and `name=value` beside it sets what it acts on. A new class gets a `case(observe, what it is built
with, …)` in the table of its room: `switch_core`, `_data`, `_models`, `_rewards`, `_run`. Observe what the library
does (losses, weights, batches, files) and never the attribute that holds the argument.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from public import PUBLIC
from torch import Tensor

from lightning_rlhf.core import Algorithm

RECORDS = {
    "ComparisonBatch",
    "AdvantagesAndReturns",
    "Experience",
    "LabeledBatch",
    "Outcome",
    "PPOBatch",
    "PerAction",
    "PromptBatch",
    "Rollout",
}
RECORDS |= {"Done", "Objectives", "Reply", "ToolCall", "Turn", "SamplerWeights", "Scores", "TextBatch"}
"""Public classes that hold what flows and set nothing: their fields are data, not arguments."""
ROUNDING = 1e-9
"""Runs are in float64: what two orders of adding differ by is far below, what an argument does far above."""

Observer = Callable[[Any], Any]
"""From an object to what it does: tensors, numbers, texts, and lists and dictionaries of them."""


@dataclass(frozen=True)
class Switch:
    """Another value of one argument, and where the difference shows.

    Attributes:
        value: what the argument is switched to, from its default or from what is given.
        observe: of the object; None for that of its case.
        given: other arguments, where this one acts only beside them.
    """

    value: Any
    observe: Observer | None
    given: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A class whose arguments are switched one at a time.

    Attributes:
        observe: of an object, what its arguments move.
        given: arguments that it is built with, switched or not.
        switches: one for each argument of its constructor, by name.
    """

    observe: Observer
    given: dict[str, Any]
    switches: dict[str, Switch]


Table = dict[type, Case]


def to(value: Any, /, by: Observer | None = None, **given: Any) -> Switch:
    return Switch(value, by, given)


def case(observe: Observer, given: dict[str, Any] | None = None, /, **switches: Switch) -> Case:
    return Case(observe, given or {}, switches)


def settable() -> dict[str, type]:
    """Public classes of which a user makes objects.

    Published methods have the arguments of `Algorithm` and no code of their own, which test_core_algorithm.py holds.
    """
    public = {name: kind for name, kind in PUBLIC.items() if name not in RECORDS}
    methods = {name for name, kind in public.items() if Algorithm in kind.__mro__[1:]}
    return {name: kind for name, kind in public.items() if name not in methods and not inspect.isabstract(kind)}


def arguments(kinds: Iterable[type]) -> list[str]:
    """`Class.argument` of every constructor."""
    return [f"{kind.__name__}.{argument}" for kind in kinds for argument in inspect.signature(kind).parameters]


def complaints(kinds: Iterable[type], table: Table) -> list[str]:
    """What the table does not know of the classes, and what it knows of none of them."""
    walked = set(arguments(kinds))
    known = {f"{kind.__name__}.{argument}" for kind, case in table.items() for argument in case.switches}
    new = [f"{name} moves nothing that the suite knows of: add it to tests/repo/switch_*.py" for name in walked - known]
    stale = [f"{name} is no argument of the library: take it out of tests/repo/switch_*.py" for name in known - walked]
    return sorted(new) + sorted(stale)


def complaint(kind: type, argument: str, case: Case) -> str | None:
    """Why the argument can't be said to move what its case observes; None where it moves it."""
    switch = case.switches[argument]
    observe, given = switch.observe or case.observe, case.given | switch.given
    name = f"{kind.__name__}.{argument}"
    first, again = (_observed(kind, given, observe) for _ in range(2))
    if differs(first, again):
        return f"{name}: what is observed differs from run to run, so that everything would seem to move it"
    if not differs(first, _observed(kind, given | {argument: switch.value}, observe)):
        return f"{name} moves nothing: {switch.value!r} gives the same {observe.__name__}"
    return None


def differs(one: Any, other: Any) -> bool:
    """Whether two observations differ by more than rounding."""
    if isinstance(one, Tensor | float) and isinstance(other, Tensor | float):
        one, other = (torch.as_tensor(x).detach().double() for x in (one, other))
        return one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=ROUNDING, equal_nan=True)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(differs(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) != len(other) or any(differs(x, y) for x, y in zip(one, other, strict=True))
    return type(one) is not type(other) or one != other


def _observed(kind: type, given: dict[str, Any], observe: Observer) -> Any:
    torch.manual_seed(0)
    return observe(kind(**copy.deepcopy(given)))  # training must not wear out what the next run is given
