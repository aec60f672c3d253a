"""What is drawn is what was logged: fits, best of n, intervals, joined logs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import fmean

import pytest
from run_files import sample, write_csv, write_jsonl

from lightning_rlhf.report import read_runs
from lightning_rlhf.report.frontier import best_of_start, fit_gao
from lightning_rlhf.report.statistics import by_iteration, correlation, deciles, mean_interval, share_interval


def test_fit_finds_the_curve_that_was_planted() -> None:
    d = [0.0, 0.3, 0.9, 1.7, 2.5, 4.0]
    curve = fit_gao(d, [0.25 + x * (1.5 - 0.75 * math.log(x)) if x else 0.25 for x in d])
    assert (curve.start, curve.alpha, curve.beta) == pytest.approx((0.25, 1.5, 0.75), abs=1e-9)
    assert curve.residual < 1e-9
    assert curve.peak == pytest.approx(math.e)  # e^(α/β − 1), α/β = 2
    assert curve(math.e) > max(curve(math.e - 0.1), curve(math.e + 0.1))


def test_fit_needs_five_different_distances() -> None:
    assert fit_gao([0.0, 1.0, 2.0, 3.0, 3.0, 3.0], [0.0] * 6) is None


def test_curve_that_does_not_bend_down_has_no_peak() -> None:
    d = [0.5, 1.0, 2.0, 3.0, 4.0]
    assert fit_gao(d, [x * (1 + 0.2 * math.log(x)) for x in d]).peak is None


def test_best_of_n_of_the_start_is_the_mean_over_all_draws() -> None:
    groups = {"a": [0.0, 3.0, 1.0], "b": [-1.0, 2.0, 5.0]}
    rows = [{"prompt": prompt, "score": score} for prompt, scores in groups.items() for score in scores]
    best = best_of_start(rows)
    assert (best.largest, best.pooled) == (3, False)
    naive = [
        fmean(fmean(max(draw) for draw in itertools.combinations(scores, n)) for scores in groups.values())
        for n in (1, 2, 3)
    ]
    assert best.rewards == pytest.approx(naive, abs=1e-12)
    assert best.d == pytest.approx([math.sqrt(math.log(n) - (n - 1) / n) for n in (1, 2, 3)], abs=1e-12)


def test_one_response_to_a_prompt_is_pooled_and_says_so() -> None:
    best = best_of_start([{"prompt": p, "score": s} for p, s in (("a", 1.0), ("b", 2.0))])
    assert best.pooled
    assert best.rewards == pytest.approx([1.5, 2.0])
    assert best_of_start([{"prompt": "a", "score": 1.0}]) is None


def test_intervals() -> None:
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 1.96, 2 + 1.96))  # s = √2, s/√n = 1
    assert mean_interval([5.0]) == (5.0, 5.0)
    assert deciles(list(range(11))) == pytest.approx((1, 9))
    low, high = share_interval(1.0, 10)
    assert high == 1.0
    assert low == pytest.approx(10 / (10 + 1.96**2))  # Wilson's lower end for a share of 1
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert correlation([1, 2, 3], [1, 1, 1]) is None


def test_evaluation_stands_after_the_step_that_it_follows(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/reward": 1.0}, {"step": 0, "objective/scores": 2.0}, {"step": 0, "eval/reward": 3.0}]
    write_csv(tmp_path / "run" / "metrics.csv", rows)
    (run,) = read_runs([tmp_path / "run"])
    assert run.metrics["eval/reward"].x == (0, 1)
    assert run.metrics["eval/reward"].y == (1.0, 3.0)
    assert run.metrics["objective/scores"].x == (0,)


def test_log_that_goes_on_is_joined_and_one_that_begins_anew_is_alone(tmp_path: Path) -> None:
    def log(version: int, steps: range, value: float) -> None:
        rows = [{"step": step, "objective/scores": value} for step in steps]
        write_csv(tmp_path / "run" / f"version_{version}" / "metrics.csv", rows)

    log(0, range(5), 9.0)
    log(1, range(4), 1.0)
    log(2, range(2, 6), 2.0)  # goes on from the checkpoint after step 2
    (run,) = read_runs([tmp_path / "run"])
    assert run.metrics["objective/scores"].x == (0, 1, 2, 3, 4, 5)
    assert run.metrics["objective/scores"].y == (1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
    assert any("version_0" in note for note in run.notes)


def test_torn_last_lines_are_left_out(tmp_path: Path) -> None:
    write_csv(tmp_path / "run" / "metrics.csv", [{"step": 0, "objective/scores": 1.5}])
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("1,2.")
    write_jsonl(tmp_path / "run" / "samples.jsonl", [sample(0, 0, 1.0, "whole")])
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write('{"iteration": 1, "sta')
    (run,) = read_runs([tmp_path / "run"])
    assert run.metrics["objective/scores"].y == (1.5,)
    assert by_iteration(run.held_out.column("score")).y == (1.0,)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.csv", "a,b\n1,2\n", "no column `step`"),
        ("metrics.csv", "step,x\n0,1,2\n", "line 2: 3 cells under 2 columns"),
        ("metrics.csv", "step,x\n0,often\n", "column `x`: found 'often'"),
        ("rollouts.jsonl", '{"iteration": 0}\n', "`score` must be a number"),
        ("rollouts.jsonl", '{"iteration": -1, "score": 1}\n', "`iteration` must be a whole number of at least 0"),
        ("rollouts.jsonl", "[1]\n", "found a JSON list"),
        ("rollouts.jsonl", "{broken}\n", "line 1: broken JSON"),
        ("samples.jsonl", '{"iteration": 0, "score": 1, "stage": 3, "index": 0}\n', "`stage` must be a text"),
    ],
)
def test_malformed_log_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=said) as refused:
        read_runs([tmp_path / "run"])
    assert name in str(refused.value)


def test_folder_without_a_run_says_what_one_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: there is no metrics\.csv"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="there is no folder"):
        read_runs([tmp_path / "none"])
