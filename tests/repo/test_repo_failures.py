"""The gallery of failures: each is told by its metric without a guard, and held or stopped by each guard."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "failures"
SHORT = {
    "kl_explosion": 12,
    "entropy_collapse": 26,
    "length_hacking": 12,
    "reward_hacking": 30,
    "all_truncated": 16,
    "flat_groups": 42,  # a curriculum acts from the second pass over the 256 prompts on
    "stale_sampler": 12,
}
"""Rollouts of each, fewer than in the example."""
sys.path.insert(0, str(FOLDER))
FAILURES = import_module("failure_cases").FAILURES
sys.path.remove(str(FOLDER))
RUNS = [(name, run) for name in FAILURES for run in FAILURES[name].runs]


@cache
def run_module() -> Any:
    """The example's `run.py`, under a name of its own: other examples have one too."""
    sys.path.insert(0, str(FOLDER))
    spec = spec_from_file_location("failures_run", FOLDER / "run.py")
    module = sys.modules["failures_run"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(FOLDER))
    return module


def table() -> list[dict[str, str]]:
    with (FOLDER / "results" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Makes a run once, and returns how it ended with its folder."""
    runs = tmp_path_factory.mktemp("failures")

    @cache
    def ended(name: str, guard: str) -> tuple[Any, Path]:
        rollouts = 10 if guard == "DynamicSampling" else SHORT[name]  # it draws much
        return run_module().train(name, guard, rollouts=rollouts, runs=runs), runs / name / guard

    return ended


@pytest.mark.parametrize(("name", "guard"), RUNS, ids=["-".join(pair) for pair in RUNS])
def test_run_fails_unless_guarded(name: str, guard: str, run: Callable[..., Any]) -> None:
    failure = FAILURES[name]
    ending, folder = run(name, guard)
    if guard in failure.guards:
        assert ending.stopped or not failure.failed(ending.last)
    else:  # the control, and what is shown not to help
        assert not ending.stopped
        assert ending.first(failure) is not None
        assert failure.failed(ending.last)
    assert (folder / "rollouts.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("name", "guard", "said"),
    [
        ("kl_explosion", "KLGuard", r"objective/kl is [\d.]+, over its budget of 10"),
        ("length_hacking", "KLGuard", r"objective/response_length is [\d.]+, over its budget of 11"),
        ("stale_sampler", "versions", "were drawn by weights of another version"),
        ("reward_hacking", "best_by_gold", r"EarlyStopping after \d+"),
    ],
)
def test_what_stops_a_run_says_so(name: str, guard: str, said: str, run: Callable[..., Any]) -> None:
    ending, _ = run(name, guard)
    assert re.search(said, ending.stopped)


def test_best_by_gold_is_kept(run: Callable[..., Any]) -> None:
    """An evaluation before the last one, after which the gold reward had fallen."""
    ending, folder = run("reward_hacking", "best_by_gold")
    gold = ending.beside["eval/gold/reward"]
    best = max(gold, key=gold.__getitem__)
    assert best < max(gold)
    assert list(folder.glob(f"checkpoints/best-step={best}.ckpt"))


def test_values_are_keyed_by_the_updates_before_them(run: Callable[..., Any]) -> None:
    """The policy of the first rollout is the reference; the first validation comes after five updates."""
    kl, _ = run("kl_explosion", "AdaptiveKL")
    assert min(kl.values) == 0
    assert abs(kl.values[0]) < 1e-4 < kl.values[1]
    gold, _ = run("reward_hacking", "best_by_gold")
    assert list(gold.values)[:2] == [5, 10]


def test_table_and_picture_are_written(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    names = [pair for pair in RUNS if pair[0] in ("length_hacking", "all_truncated")]
    run_module().write({pair: run(*pair)[0] for pair in names}, tmp_path)
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["failure"], row["run"]) for row in rows] == names
    assert (tmp_path / "failures.png").stat().st_size > 10_000
    assert "all_truncated | objective/eos_rate" in capsys.readouterr().out


def test_every_failure_and_run_is_in_the_committed_table() -> None:
    assert [(row["failure"], row["run"]) for row in table()] == RUNS


def test_page_shows_the_committed_table() -> None:
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    for row in table():
        cells = [f"`{row['run']}`", row["at rollout"], row["last value"]]
        section = page.partition(f"\n## {row['failure'].replace('_', ' ').capitalize().replace('Kl', 'KL')}\n")[2]
        section = section.partition("\n## ")[0]
        assert f"`{row['first metric']}`" in section
        assert f"| {' | '.join(cells)} |" in section, row
