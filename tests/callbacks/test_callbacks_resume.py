"""A run that was killed and goes on ends with the very bits of one that was not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("resume_program.py")
PROMPTS = ["a b", "c", "d e f", "g", "h i", "j k l m", "n", "o p", "q r s", "t", "u"] * 2  # 3 rollouts of 8 an epoch
KILLS = ["rollout", "minibatch", "write", "rename"]
POLITE = {"1-interrupt": 1, "1-terminate": 143}
"""Signals to every process of the run, and the status it ends with."""
MOVED = ["1to2-rollout", "2to1-minibatch"]
"""Resumed on another number of processes, with the batch and the minibatch of all of them as before."""
NAMES = [*(f"1-{kill}" for kill in KILLS), "2-rollout", "2-minibatch", "2-write"]


@pytest.fixture(scope="module")
def ends(tmp_path_factory, forking_python, make_lm, make_tokenizer) -> Callable[[str, int], dict[str, Any]]:
    """What a run ended with, by its name and rank."""
    folder = tmp_path_factory.mktemp("resume")
    make_lm(end=list(range(10))).save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    for name, rows in {
        "prompts": [{"prompt": p} for p in PROMPTS],
        "texts": [{"text": f"{p} x y z"} for p in PROMPTS],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [forking_python, str(PROGRAM), str(folder), ",".join(["1-never", "2-never", *NAMES, *MOVED, *POLITE])],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def end(name: str, rank: int = 0) -> dict[str, Any]:
        found = folder / name / f"end-{rank}.pt"
        assert found.exists(), done.stderr[-4000:]
        notes = [] if "never" in name else ["left", "status"]
        return torch.load(found) | {note: (folder / name / f"{note}.txt").read_text().split() for note in notes}

    return end


@pytest.mark.parametrize("name", NAMES)
def test_killed_run_ends_as_the_uninterrupted_one(ends, name):
    devices, kill = name.split("-")
    for rank in range(int(devices)):
        whole, resumed = ends(f"{devices}-never", rank), ends(name, rank)
        assert whole["numbers"][2:] == [6, 48]
        tail = whole.pop("seen")[-len(resumed["seen"]) :]
        assert [iteration for iteration, *_ in resumed["seen"]] == [4, 5]  # mid-epoch; the fourth was whole
        assert_same(tail, resumed.pop("seen"), "seen")
        assert int(resumed.pop("status")[0]) != 0
        expected = {"rollout": 0, "minibatch": 0, "write": 1, "rename": 1}[kill]
        assert sum(part.endswith(".part") for part in resumed.pop("left")) == expected
        assert_same(whole, resumed)


@pytest.mark.parametrize("name", MOVED)
def test_run_goes_on_with_another_number_of_processes(ends, name):
    """The numbers are those of one process, but for the order in which sums are taken."""
    whole, resumed = ends("1-never"), ends(name)
    assert whole["numbers"][2:] == resumed["numbers"][2:] == [6, 48]
    assert whole["global_step"] == resumed["global_step"]
    assert resumed["numbers"][:2] == pytest.approx(whole["numbers"][:2], abs=1e-9)
    for key, weight in whole["weights"].items():
        if isinstance(weight, torch.Tensor):
            assert torch.allclose(weight, resumed["weights"][key], rtol=0, atol=1e-9), key


@pytest.mark.parametrize("name", POLITE)
def test_run_that_was_told_to_leave_ends_as_the_uninterrupted_one(ends, name):
    """It finished the rollout and saved it, though its data workers heard the signal too."""
    whole, resumed = ends("1-never"), ends(name)
    assert int(resumed.pop("status")[0]) == POLITE[name]
    assert resumed.pop("left") == ["last-previous.ckpt", "last.ckpt"]
    tail = whole.pop("seen")[-1:]
    assert [iteration for iteration, *_ in resumed["seen"]] == [5]
    assert_same(tail, resumed.pop("seen"), "seen")
    assert_same(whole, resumed)


def test_something_moves_in_every_part_of_the_state(ends):
    """Or equality above would say nothing of it."""
    one, two = ends("1-never"), ends("2-never")
    kl, b, *_ = one["numbers"]
    assert kl != 0.2
    assert b != 1.0
    assert one["baseline"]
    assert any(not torch.equal(one["average"][name], one["weights"][f"policy.{name}"]) for name in one["average"])
    assert not torch.equal(one["seen"][0][1], two["seen"][0][1])  # two processes share the prompts
    assert one["seen"][0][0] == 0
