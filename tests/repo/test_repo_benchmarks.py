"""The benchmarks: each command runs at its quick size, and what it reports is what it says."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
HAS_TRL = find_spec("trl") is not None
needs_vader = pytest.mark.skipif(find_spec("vaderSentiment") is None, reason="needs VADER, which the models speak")
TURN = {"model": "toy", "precision": "32-true", "wall": 1.0, "cpu": 1.0, "rss": 1.0, "tokens": 8}


@pytest.fixture
def bench(monkeypatch):
    """The modules of the folder, importable by their own names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.modules.pop("ingredients", None)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(forking_python) -> Callable[..., None]:
    """Runs a command, whose processes are forks."""

    def run(command: str, folder: Path, *args: str) -> None:
        line = [forking_python, str(FOLDER / f"{command}.py"), "--quick", "--out", str(folder), *args]
        subprocess.run(line, check=True, timeout=300)

    return run


@pytest.mark.slow
@needs_vader
def test_step_measures_sides_in_turns_on_full_responses(run, tmp_path):
    run("step", tmp_path, "--sides", "ours", "floor")
    turns = rows(tmp_path / "step_turns.csv")
    assert [(row["block"], row["side"]) for row in turns] == [
        ("0", "ours"),
        ("0", "floor"),
        ("1", "floor"),
        ("1", "ours"),
    ]
    assert all(float(row["tokens"]) == 4 * 4 for row in turns)  # 2 prompts x 2 responses, 4 tokens each
    ours, floor = rows(tmp_path / "step.csv")
    assert float(ours["cpu/floor"]) > 0
    assert (ours["cpu/trl"], floor["cpu/floor"]) == ("", "")


@pytest.mark.slow
@needs_vader
@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
def test_learning_writes_both_curves(run, tmp_path):
    pytest.importorskip("matplotlib")
    run("learning", tmp_path, "--target", "9")
    found = rows(tmp_path / "learning.csv")
    for side in ("ours", "trl"):
        own = [row for row in found if row["side"] == side]
        assert [int(row["step"]) for row in own] == list(range(1, 13))
        assert [float(row["cpu"]) for row in own] == sorted(float(row["cpu"]) for row in own)  # it adds up
    assert [row["ours_cpu"] for row in rows(tmp_path / "learning_times.csv")] == ["", ""]  # no score is 9
    assert (tmp_path / "learning.png").stat().st_size > 10_000


@pytest.mark.slow
@needs_vader
def test_rollouts_have_geometric_lengths_on_both_sides(bench, forking_python, tmp_path, monkeypatch):
    import lengths

    monkeypatch.setattr(sys, "executable", forking_python)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests keep theirs
    lengths.main(["--quick", "--out", str(tmp_path), "--rows", "32", "--batch", "8"])
    found = rows(tmp_path / "lengths.csv")
    assert [row["side"] for row in found] == ["ours", "generate, all rows", "generate, 8 rows"]
    expected = 4 * (1 - 0.75**16)  # geometric of mean 4, capped at 16: 3.96 tokens
    error = (12 / 32) ** 0.5  # its variance without the cap is 4 x 3
    assert all(abs(float(row["mean"]) - expected) < 4 * error for row in found)
    assert all(int(row["longest"]) > 4 for row in found)


@pytest.mark.slow
@needs_vader
def test_packed_microbatches_compute_real_tokens_and_the_same_gradient(run, tmp_path):
    run("packing", tmp_path)
    padded, packed = rows(tmp_path / "packing.csv")
    assert [row["side"] for row in (padded, packed)] == ["padded", "packed"]
    # of the prompts all tokens and of the responses all but the last one, which predicts nothing
    assert int(packed["real"]) - 8 <= int(packed["tokens"]) <= int(packed["real"]) < int(padded["tokens"])
    assert float(packed["grad_norm"]) == pytest.approx(float(padded["grad_norm"]), rel=1e-4)


@pytest.mark.slow
@needs_vader
def test_scaling_writes_a_row_for_a_point(run, tmp_path):
    run("scaling", tmp_path, "--responses", "8", "--lengths", "--k")
    (row,) = rows(tmp_path / "scaling.csv")
    assert (row["moved"], row["value"], row["responses"], row["tokens"], row["k"]) == ("responses", "8", "8", "4", "2")


@needs_vader
def test_recording_is_timed_on_a_gpu_alone(bench, tmp_path):
    import recorded

    args = ["--quick", "--out", str(tmp_path)]
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is none here"):
            recorded.main(args)
        return
    recorded.main(args)
    found = rows(tmp_path / "recorded.csv")
    assert [row["way"] for row in found[:2]] == ["recorded", "pass by pass"]
    assert found[0]["tokens"] == found[1]["tokens"]


def test_scaling_moves_one_size_at_a_time(bench):
    from argparse import Namespace

    from scaling import points
    from work import Work

    chosen = Namespace(responses=[32], lengths=[96], k=[8])
    found = {moved: (work.responses, work.tokens, work.samples) for moved, _, work in points(Work(), chosen)}
    assert found == {"responses": (32, 48, 2), "length": (16, 96, 2), "k": (16, 48, 8)}


def test_ratio_is_of_turns_of_one_block(bench):
    from table import ratio

    turns = [TURN | {"block": 0, "side": "ours", "cpu": 1.0}, TURN | {"block": 0, "side": "trl", "cpu": 2.0}]
    turns += [TURN | {"block": 1, "side": "ours", "cpu": 30.0}, TURN | {"block": 1, "side": "trl", "cpu": 60.0}]
    turns += [TURN | {"block": 2, "side": "ours", "cpu": 1.0}, TURN | {"block": 2, "side": "trl", "cpu": 4.0}]
    assert ratio(turns, "cpu", "ours", "trl") == 0.5  # of 0.5, 0.5, 0.25; the medians alone would give 1/4
    assert ratio(turns, "cpu", "ours", "floor") is None


def test_what_lies_in_no_phase_is_trl_s_update_and_the_rest_of_others(bench):
    from table import summary

    phases = {"wall": 10.0, "generate": 4.0, "reference": 1.0}
    trl, ours = TURN | phases | {"side": "trl"}, TURN | phases | {"side": "ours", "update": 3.0}
    found = {side: summary([trl, ours, TURN | {"side": "floor"}], side) for side in ("trl", "ours", "floor")}
    assert [(row["update_s"], row["rest_s"]) for row in found.values()] == [(5.0, None), (3.0, 2.0), (None, None)]
    assert found["ours"]["tokens_per_s"] == 0.8


def test_target_is_reached_by_ten_steps_not_by_one(bench):
    from learning import reached

    scores = [0.0] * 9 + [4.0] + [0.4] * 10
    ours = [{"step": step, "score": score} for step, score in enumerate(scores, 1)]
    assert reached(ours, 0.4)["step"] == 10  # the mean of nine zeros and a 4
    assert reached(ours, 0.5)["step"] == 13  # (4 + 3 x 0.4)/10 = 0.52; at step 12 it is 0.48
    assert reached(ours[:9], 0.0) is None  # fewer than ten steps are no mean


@needs_vader
def test_ending_has_its_probability_in_every_context_and_none_in_training(bench):
    from models import Ending

    head = nn.Linear(5, 7, bias=False)
    head.register_forward_hook(Ending([2, 3], 0.25))
    x = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ending = head(x).softmax(-1)
        plain = nn.functional.linear(x, head.weight)[:, [0, 1, 4, 5, 6]].softmax(-1)
    torch.testing.assert_close(ending[:, [2, 3]].sum(-1), torch.full((6,), 0.25))
    torch.testing.assert_close(ending[:, [0, 1, 4, 5, 6]] / 0.75, plain)  # the others keep their proportions
    torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight))


@needs_vader
def test_floor_draws_from_the_softmax(bench):
    from floor import drawn

    torch.manual_seed(0)
    logits = torch.zeros(1, 600)
    logits[0, [3, 255, 256, 599]] = torch.tensor([9.0, 10.0, 9.5, 9.0])  # at the seams of the blocks of 256
    expected = logits[0].double().softmax(-1)
    counts = torch.bincount(drawn(logits.expand(20_000, -1)), minlength=600).double() / 20_000
    for token in (3, 255, 256, 599):
        error = (expected[token] * (1 - expected[token]) / 20_000).sqrt()
        assert abs(counts[token] - expected[token]) < 4 * error


def test_work_survives_the_trip_to_a_worker(bench):
    from work import Work, pairs

    work = Work(model="toy", ours={"ptx_coef": 0.0}, end=None)
    assert Work(**json.loads(work.json())) == work
    named = Work(ours={"ptx_coef": 0.5, "updates.microbatch": 8, "generation.seed": 3})
    assert (named.options(), named.options("updates")) == ({"ptx_coef": 0.5}, {"microbatch": 8})
    assert pairs(["a=1", 'b="x=y"', "c=null"]) == {"a": 1, "b": "x=y", "c": None}
