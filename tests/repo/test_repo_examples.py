"""Each example runs as its first lines say, on tiny networks, and does what it shows."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_rlhf.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = ["own_reward", "own_surrogate", "own_advantage"]
Arguments = Callable[..., list[str]]


@pytest.fixture(params=OWN)
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An example's folder, on the path as `PYTHONPATH` puts it there."""
    monkeypatch.syspath_prepend(EXAMPLES / request.param)
    return request.param


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES / name)
    return import_module(name)


@pytest.mark.parametrize("folder", [*OWN, "existing_project"])
def test_example_is_one_short_file_and_one_yaml(folder: str) -> None:
    kept = [path for path in (EXAMPLES / folder).iterdir() if path.name != "__pycache__"]
    assert sorted(path.suffix for path in kept) == [".py", ".yaml"]
    for path in kept:
        text = path.read_text(encoding="utf-8")
        assert f"--config examples/{folder}/{Path(path).stem}.yaml" in text
        assert len(text.splitlines()) <= 40


def test_own_class_trains_by_the_command_line(example: str, ppo: Arguments, workplace: Path) -> None:
    overlay = EXAMPLES / example / f"{example}.yaml"
    changes = {"model__reward__path": None} if example == "own_reward" else {}
    arguments = ppo(**changes)
    cli = main(["fit", *arguments[:2], "--config", str(overlay), *arguments[2:]])
    part = getattr(cli.model, example.removeprefix("own_"))
    assert type(part).__module__ == example
    assert cli.model.iteration == 2


def test_overlay_s_argument_arrives(ppo: Arguments, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load("own_surrogate", monkeypatch)
    overlay = str(EXAMPLES / "own_surrogate" / "own_surrogate.yaml")
    assert main(["fit", *ppo(), "--config", overlay]).model.surrogate == own.SoftClip(epsilon=0.1)


def test_last_number_is_compared_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load("own_reward", monkeypatch).LastNumber(attempt=0.25)
    responses = ["3 and 5", "5 or 3", "none", "-5", "5.0"]
    assert reward.score([""] * 5, responses, answer=["5"] * 5, other=[0] * 5) == [1.0, 0.25, 0.0, 0.25, 1.0]


def test_soft_clip_starts_as_the_plain_ratio_and_ends_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    surrogate = load("own_surrogate", monkeypatch).SoftClip(epsilon=0.2)
    log_ratio = torch.tensor([[0.0, 3.0, -3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]], dtype=torch.float64)
    loss = surrogate(log_ratio, advantages).loss
    loss.sum().backward()
    assert loss[0, 0] == -2
    assert log_ratio.grad[0, 0] == -2  # d(−ρÂ)/d log ρ at ρ = 1
    assert loss[0, 1].item() == pytest.approx(-2 * 1.2)  # ρ = e³ pays no more than the upper bound
    assert abs(log_ratio.grad[0, 1]) < 1e-9
    assert loss[0, 2].item() == pytest.approx(2 * 0.8, abs=1e-3)  # tanh(−4.75) is −0.99985
    assert loss[0, 3].item() == pytest.approx(2 * torch.tensor(3.0).exp().item())  # pessimistic: nothing is bounded


def test_win_rate_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = load("own_advantage", monkeypatch).WinRate()
    rewards = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 0.0], [-9.0, 0.0]])
    mask = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    credit = estimator(rewards, torch.zeros(4, 2), mask, groups=torch.arange(4), all_sum=lambda x: x)
    assert credit.advantages.tolist() == [[0.0, 0.0], [0.75, 0.75], [0.0, 0.0], [-0.75, 0.0]]


def test_existing_project_trains(
    tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = EXAMPLES / "existing_project"
    config = yaml.safe_load((folder / "project.yaml").read_text(encoding="utf-8"))
    config["model"]["policy"]["init_args"]["folder"] = config["model"]["tokenizer"] = tiny.policy
    config["data"] |= {"train": tiny.file("prompts"), "batch_size": 4}
    config["trainer"] |= {"limit_train_batches": 2, "accelerator": "cpu", "enable_progress_bar": False}
    config["model"] |= {"updates": {"minibatch": 2, "microbatch": 1}, "generation": {"max_new_tokens": 4}}
    Path("project.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.syspath_prepend(folder)  # as `python project.py` does
    monkeypatch.setattr("sys.argv", ["project.py", "fit", "--config", "project.yaml"])
    cli = runpy.run_path(str(folder / "project.py"), run_name="__main__")["cli"]
    assert "rollout 2: score" in capsys.readouterr().out
    assert list(Path("runs").rglob("metrics.csv"))
    frozen = [name for name, weight in cli.model.policy.named_parameters() if not weight.requires_grad]
    assert frozen
    assert all(".layers.0." in name for name in frozen)
