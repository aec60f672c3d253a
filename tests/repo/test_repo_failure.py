"""A refusal is a sentence and a status; a bug keeps its traceback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _error_if_any_worker_fails, _remove_worker_pids, _set_worker_pids

from lightning_rlhf import ModelSource
from lightning_rlhf.callbacks import StopTraining
from lightning_rlhf.cli import console
from lightning_rlhf.cli.failure import TRACEBACK, one_line, sentence, status
from lightning_rlhf.core import Clip


def caught(act: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011
        act()
    return found.value


def broken() -> None:
    raise RuntimeError("of somebody else")


def mine() -> None:
    raise ValueError("of somebody else")


def test_what_the_library_refuses_is_a_sentence() -> None:
    assert sentence(caught(lambda: Clip(epsilon=-1.0))) == "`epsilon` must be a number above 0: got -1.0"
    assert sentence(caught(lambda: torch.optim.SGD([torch.ones(1)], lr=-1.0))) == "Invalid learning rate: -1.0"
    assert "there is no folder /none" in sentence(caught(ModelSource(path="/none").causal_lm))


def test_run_that_a_guard_stops_ends_in_a_sentence() -> None:
    error = caught(lambda: StopTraining().act(None, None, "rollout 3: objective/kl is 9.0, over its budget of 5.0"))
    assert type(error) is RuntimeError
    assert sentence(error).startswith("rollout 3: objective/kl is 9.0, over its budget of 5.0: the run was stopped")
    assert status(error) == 1


def test_killed_data_worker_is_a_sentence_wherever_it_is_noticed() -> None:
    """By PyTorch's handler of a signal, in the middle of anything; the message is PyTorch's own."""
    worker = subprocess.Popen(["sleep", "60"])
    _set_worker_pids(7, (worker.pid,))

    def notice() -> None:
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # raises by itself where a loader set the handler
        _error_if_any_worker_fails()

    try:
        error = caught(notice)
    finally:
        _remove_worker_pids(7)
        worker.wait()
    assert "killed by signal: Killed" in sentence(error)
    assert "resume with fewer `num_workers`" in sentence(error)
    assert status(error) == 1


@pytest.mark.parametrize(
    "act",
    [
        mine,
        broken,
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: torch.nn.functional.cross_entropy(torch.ones(2, 2), torch.ones(3).long()),
        lambda: ModelSource(path=3).causal_lm(),  # a TypeError of pathlib: nobody raised it for a user
    ],
)
def test_what_nobody_refused_is_a_bug(act: Callable[[], Any]) -> None:
    assert sentence(caught(act)) is None


def test_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    error = caught(lambda: Clip(epsilon=-1.0))
    monkeypatch.setenv(TRACEBACK, "1")
    assert sentence(error) is None


def test_status_tells_data_from_configs() -> None:
    assert status(caught(ModelSource(path="/none").causal_lm)) == 1


def test_quoted_data_can_not_drive_the_terminal() -> None:
    assert one_line("a\n  b \x1b[31m\u202e") == r"a b \x1b[31m\u202e"


def test_reward_of_the_user_that_raises_keeps_its_traceback(ppo: Any, workplace: Path, monkeypatch: Any) -> None:
    (workplace / "raising_reward.py").write_text("def fn(prompts, responses):\n    raise ValueError('mine')\n")
    monkeypatch.syspath_prepend(workplace)
    arguments = ["validate", *ppo(model__reward__path=None), "--model.reward=raising_reward.fn"]
    monkeypatch.setattr("sys.argv", ["lightning-rlhf", *arguments])
    with pytest.raises(ValueError, match="mine"):
        console()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--model.model.path=runs/none/model"], 1, "there is no folder runs/none/model"),
        (["--data.batch_size=x"], 2, "expected int"),
        (["--data.train=none.jsonl"], 1, "none.jsonl does not exist"),
    ],
)
def test_process_ends_the_same(
    flags: list[str], code: int, says: str, forking_python: str, tiny: Any, workplace: Path
) -> None:
    named = ["--model=SFTModule", f"--model.model.path={tiny.policy}", "--data=DemonstrationDataModule"]
    named += [f"--data.train={tiny.file('demonstrations')}", "--trainer.accelerator=cpu", *flags]
    command = [forking_python, "-m", "lightning_rlhf", "fit", *named]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert (done.returncode, says in last, "Traceback" in done.stderr) == (code, True, False), done.stderr
