"""Episodes on the page: turns told apart, nothing in them runs, and no word of them where there are none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import sample, write_csv

from lightning_rlhf.report import write_report

ATTACK = "<script>document.title = 'run'</script>"
TURNS = [
    {"role": "policy", "text": f"call {ATTACK}", "tokens": 4, "reward": 0.25},
    {"role": "environment", "text": f"42 {ATTACK}", "tokens": 2},
    {"role": "policy", "text": "it is 42", "tokens": 3, "reward": -1.0},
]


@pytest.fixture
def page(rl_run: Callable[..., Path], tmp_path: Path) -> str:
    """Page of a run with episodes, of which the last failed."""
    episode = {"turns": TURNS, "failed": False}
    rows = [sample(0, 0, 0.0, "all", **episode), sample(8, 0, 1.0, "all", **(episode | {"failed": True}))]
    folder = rl_run(samples=rows)
    logged = [{"step": i, "objective/scores": i, "objective/turns": 2, "objective/failed": 0.5} for i in range(8)]
    write_csv(folder / "version_0" / "metrics.csv", logged)
    return write_report([folder], output=tmp_path / "out").read_text(encoding="utf-8")


def test_turns_are_told_apart_with_their_rewards(page: str) -> None:
    sides = re.findall(r'<div class="text">(<p class="policy">.*?)</div>', page)
    assert len(sides) == 2
    writers = re.findall(r'<p class="(\w+)"><b>(\w+)</b>(?: <i class="faint">(\S+)</i>)?', sides[0])
    assert writers == [("policy", "policy", "+0.25"), ("environment", "environment", ""), ("policy", "policy", "-1")]
    assert page.count("environment failed") == 1


def test_nothing_in_a_turn_runs(page: str) -> None:
    assert ATTACK not in page
    assert page.count("&lt;script&gt;document.title") == 4


def test_logged_turns_and_failures_are_drawn(page: str, tmp_path: Path) -> None:
    assert (tmp_path / "out" / "turns.png").exists()
    assert (tmp_path / "out" / "failed.png").exists()
    assert "Mean turns of the policy in an episode." in page


def test_page_without_episodes_says_nothing_of_them(rl_run: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([rl_run()], output=tmp_path / "out").read_text(encoding="utf-8")
    shown = page[page.index("<main") :]
    assert "needs ptx/loss" in shown  # other gaps are said
    assert not re.search(r"(?i)\bturns\b|environment", shown)
