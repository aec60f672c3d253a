"""No argument is dead: of each, two values give different results (`switch_*.py` says which, and where it shows)."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import switch_core
import switch_data
import switch_engines
import switch_episodes
import switch_judges
import switch_models
import switch_rewards
import switch_run
import switch_serve
import torch
from public import PUBLIC
from switch_bench import Bench
from switch_harness import RECORDS, Table, arguments, case, complaint, complaints, differs, settable, to

from lightning_rlhf.core import Algorithm, Clip, Surrogate

CLASSES = settable()


@pytest.fixture(scope="module")
def table(tmp_path_factory, make_lm, make_scorer, make_tokenizer, left_padded, right_padded) -> Table:
    bench = Bench(
        tmp_path_factory.mktemp("switches"),
        lm=make_lm,
        scorer=make_scorer,
        tokenizer=make_tokenizer(),
        left_padded=left_padded,
        right_padded=right_padded,
    )
    rooms = (switch_models, switch_rewards, switch_judges, switch_data, switch_run, switch_engines, switch_episodes)
    rooms += (switch_serve,)
    areas = [area.table(bench) for area in rooms]
    return {kind: case for area in (switch_core.TABLE, *areas) for kind, case in area.items()}


@pytest.mark.parametrize("name", arguments(CLASSES.values()))
def test_argument_moves_the_result(table, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write beside them
    kind, argument = name.split(".")
    known = table.get(CLASSES[kind])
    if known is None or argument not in known.switches:
        pytest.fail(f"{name} moves nothing that the suite knows of: add it to tests/repo/switch_*.py")
    problem = complaint(CLASSES[kind], argument, known)
    assert problem is None


def test_table_covers_the_signatures(table):
    assert complaints(CLASSES.values(), table) == []


def test_only_records_and_interfaces_are_left_out():
    for name in PUBLIC.keys() - CLASSES.keys():
        kind = PUBLIC[name]
        method = Algorithm in kind.__mro__
        assert (
            method or inspect.isabstract(kind) or issubclass(kind, tuple) or kind.__module__ == "lightning_rlhf.types"
        ), name
    assert PUBLIC.keys() >= RECORDS


# Negative controls: the machinery reports what it is for


class Lamp:
    """Of which `color` does nothing."""

    def __init__(self, power: float = 1.0, color: float = 1.0) -> None:
        self.power, self.color = power, color


def light(lamp: Lamp) -> dict[str, Any]:
    return {"light": [torch.full((2,), lamp.power), 1.0], "name": "lamp"}


LAMP = case(light, power=to(2.0), color=to(2.0))


def test_dead_argument_is_reported():
    assert complaint(Lamp, "power", LAMP) is None
    assert complaint(Lamp, "color", LAMP) == "Lamp.color moves nothing: 2.0 gives the same light"


def test_dead_argument_of_the_library_is_reported():
    class Deaf(Clip):
        def __call__(self, log_ratio, advantages):
            return Clip()(log_ratio, advantages)

    for argument in ("epsilon", "epsilon_high", "dual"):
        assert complaint(Clip, argument, switch_core.TABLE[Clip]) is None
        assert "moves nothing" in complaint(Deaf, argument, switch_core.TABLE[Clip])


def test_chance_is_not_taken_for_an_effect():
    generator = torch.Generator()

    def noise(lamp: Lamp) -> torch.Tensor:
        return torch.rand(3, generator=generator)

    assert "differs from run to run" in complaint(Lamp, "color", case(noise, color=to(2.0)))


def test_new_and_stale_arguments_are_reported():
    assert complaints([Lamp], {Lamp: LAMP}) == []
    assert complaints([Lamp], {Lamp: case(light, power=to(2.0), size=to(2.0))}) == [
        "Lamp.color moves nothing that the suite knows of: add it to tests/repo/switch_*.py",
        "Lamp.size is no argument of the library: take it out of tests/repo/switch_*.py",
    ]
    assert complaints([], {Lamp: LAMP}) != []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.ones(2), torch.ones(2) + 1e-12, False),  # rounding
        (torch.ones(2), torch.ones(2) + 1e-6, True),
        (torch.ones(2), torch.ones(3), True),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), False),
        (1.0, 1.0 + 1e-12, False),
        ([1, "a"], [1, "a"], False),
        ([1, "a"], [1, "b"], True),
        ({"a": 1}, {"b": 1}, True),
        (None, 0.0, True),
    ],
)
def test_differences_are_told_from_rounding(one, other, expected):
    assert differs(one, other) is expected


def test_abstract_classes_are_not_walked():
    assert "Surrogate" not in CLASSES
    assert inspect.isabstract(Surrogate)
    assert {"Clip", "PPOModule", "PromptDataModule", "EMA", "ModelSource"} <= CLASSES.keys()
