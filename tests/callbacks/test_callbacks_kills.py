"""A run that was killed anywhere, more than once, and resumed is the uninterrupted run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from same import assert_same

from lightning_rlhf.report.metrics import read_metrics

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("kill_program.py")
STAGES = ("sft", "reward", "ppo")
TRIALS = int(os.environ.get("LIGHTNING_RLHF_KILLS", "4"))
"""Of each stage; more of them, and another LIGHTNING_RLHF_KILL_SEED, before a change of checkpoints is done."""
SEED = os.environ.get("LIGHTNING_RLHF_KILL_SEED", "0")
TIMED = ("time/", "throughput/", "memory/")


@pytest.fixture(scope="module")
def trials(tmp_path_factory, forking_python, make_lm, make_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_lm(end=list(range(10))).save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    prompts = ["a b", "c", "d e f", "g", "h i", "j k l m", "n", "o p", "q r s", "t", "u", "v", "w x", "y", "z", "a"]
    rows = {
        "prompts": [{"prompt": p} for p in prompts],
        "held_out": [{"prompt": p, "response": f"{p} x"} for p in prompts[:5]],
        "demonstrations": [{"prompt": p, "response": f"x {p}"} for p in prompts],
        "rankings": [{"prompt": p, "chosen": f"x {p}", "rejected": f"{p} y z"} for p in prompts],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [forking_python, str(PROGRAM), str(folder), ",".join(STAGES), SEED, str(TRIALS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=60 * TRIALS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def metrics(folder: Path) -> dict[str, tuple]:
    """Each logged number over the run's versions, as the report reads them."""
    logs = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda log: int(log.parent.name.partition("_")[2]))
    series = read_metrics(logs).series
    return {name: (values.x, values.y) for name, values in sorted(series.items()) if not name.startswith(TIMED)}


def position(checkpoint: dict[str, Any]) -> Any:
    """In the training data."""
    return checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]


@pytest.mark.parametrize("number", range(TRIALS))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_is_the_uninterrupted_one(trials, stage, number):
    folder = trials / f"{stage}-{number}"
    plan = (folder / "plan.json").read_text()
    whole, killed = folder / "whole", folder / "killed"
    assert_same(torch.load(whole / "end.pt"), torch.load(killed / "end.pt"), plan)
    assert metrics(whole) == metrics(killed), plan
    for name in ("rollouts.jsonl", "samples.jsonl") if stage == "ppo" else ():
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} {plan}"
    left = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert left == sorted(path.name for path in (whole / "checkpoints").iterdir()), plan
    last, other = (torch.load(run / "checkpoints" / "last.ckpt") for run in (whole, killed))
    assert_same(last["state_dict"], other["state_dict"], plan)
    assert_same(position(last), position(other), plan)


def test_something_is_measured(trials):
    """Or equality above would say nothing of it."""
    for stage in STAGES:
        whole = trials / f"{stage}-0" / "whole"
        end = torch.load(whole / "end.pt")
        assert len(end["best"]) >= 1
        assert any(name.startswith("eval/") for name in metrics(whole))
    assert (trials / "ppo-0" / "whole" / "samples.jsonl").stat().st_size
