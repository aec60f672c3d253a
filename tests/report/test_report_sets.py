"""What is logged of named held-out sets, of shares and of dynamic sampling is drawn, each by itself."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from run_files import sample, write_csv, write_jsonl

from lightning_rlhf.report import read_runs, write_report
from lightning_rlhf.report.summary import changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two rollouts with a set named `hard`, pass@k of both sets, and dynamic sampling."""
    rows = [
        {"step": 0, "eval/reward": 0.5, "eval@hard/reward": -1.0, "eval/pass_at_1": 0.25, "eval/pass_at_1_se": 0.1},
        {"step": 0, "objective/scores": 0.5, "filter/pass_rate": 0.5, "filter/tokens_per_response": 24.0},
        {"step": 1, "objective/scores": 0.75, "filter/pass_rate": 0.25, "filter/tokens_per_response": 48.0},
        {"step": 1, "eval@hard/reward": -0.5, "eval@hard/pass_at_1": 0.125, "eval/win_rate": 0.625},
        {"step": 1, "eval/reward": 1.0, "eval/pass_at_1": 0.75, "eval/pass_at_1_se": 0.2, "test/win_rate": 0.1},
    ]
    write_csv(tmp_path / "run" / "metrics.csv", rows)
    return tmp_path / "run"


def numbers(folder: Path) -> dict[tuple[str, str], list[tuple[float, ...]]]:
    """(x, y, low, high) of `report.csv` by figure and series."""
    page = write_report([folder], output=folder / "report")
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    with (page.parent / "report.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells = tuple(float(row[key]) for key in ("x", "y", "low", "high") if row[key])
            found.setdefault((row["figure"], row["series"]), []).append(cells)
    return found


def test_named_set_has_a_line_of_its_own_at_the_step_of_its_weights(folder: Path) -> None:
    drawn = numbers(folder)
    assert drawn["reward", "held out"] == [(0, 0.5), (2, 1.0)]
    assert drawn["reward", "hard"] == [(0, -1.0), (2, -0.5)]


def test_shares_are_drawn_by_set_with_their_errors(folder: Path) -> None:
    drawn = numbers(folder)
    first, last = drawn["shares", "pass@1"]
    assert first == pytest.approx((0, 0.25, 0.25 - 0.196, 0.25 + 0.196))
    assert last == pytest.approx((2, 0.75, 0.75 - 0.392, 1.0))  # a share ends at 1
    assert drawn["shares", "pass@1, hard"] == [(2, 0.125)]
    assert drawn["shares", "win rate"] == [(2, 0.625)]  # of the validation, not of the test


def test_dynamic_sampling_is_drawn(folder: Path) -> None:
    drawn = numbers(folder)
    assert drawn["learned_from", "training"] == [(0, 0.5), (1, 0.25)]
    assert drawn["drawn", "training"] == [(0, 24.0), (1, 48.0)]


def test_shares_and_sets_have_rows_in_the_table(folder: Path) -> None:
    (run,) = read_runs([folder])
    found = changes(run)
    assert (found["held-out reward, hard"].first, found["held-out reward, hard"].last) == (-1.0, -0.5)
    assert found["held-out pass@1"].key == "eval/pass_at_1"
    page = (write_report([folder], output=folder / "report")).read_text(encoding="utf-8")
    assert "share of prompts that one of N responses solves" in page


def test_responses_of_a_named_set_are_not_mixed_with_the_others(folder: Path) -> None:
    rows = [sample(i, 0, 1.0 + i, f"plain {i}") for i in (0, 2)]
    rows += [sample(i, 1, -1.0 - i, f"tough {i}", set="hard") for i in (0, 2)]
    write_jsonl(folder / "samples.jsonl", sorted(rows, key=lambda row: row["iteration"]))
    drawn = numbers(folder)
    assert [row[:2] for row in drawn["reward", "held out"]] == [(0, 1.0), (2, 3.0)]
    assert [row[:2] for row in drawn["reward", "hard"]] == [(0, -1.0), (2, -3.0)]
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("plain 0", "plain 2", "tough 0", "tough 2"))
