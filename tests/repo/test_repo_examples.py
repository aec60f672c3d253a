"""Each example runs as its first lines say, on tiny networks, and does what it shows."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed.run import get_args_parser as torchrun_parser

from lightning_rlhf import LearnedReward
from lightning_rlhf.callbacks.preflight_memory import memory_estimate
from lightning_rlhf.cli import main
from lightning_rlhf.core import RankingLoss

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


@pytest.mark.parametrize(
    "folder", [*OWN, "existing_project", "human_rankings", "lora", "multi_node", "rankings", "sweep"]
)
def test_example_is_one_yaml_and_at_most_one_short_file(folder: str) -> None:
    kept = [path for path in (EXAMPLES / folder).iterdir() if path.name != "__pycache__"]
    code = [path for path in kept if path.suffix in (".py", ".yaml")]
    assert sorted(path.suffix for path in code) in ([".py", ".yaml"], [".yaml"])
    for path in kept:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40
        if path.suffix == ".yaml":
            assert text.startswith("# Shows: ")
            assert "# Run: " in text
            assert f"--config examples/{folder}/{path.name}" in text


def test_every_folder_is_an_example_or_has_a_page() -> None:
    """Those above have a header; the larger ones a page or, the quickstart, a script that says it all."""
    larger = {path.name for path in EXAMPLES.iterdir() if (path / "README.md").is_file() or (path / "run.py").is_file()}
    short = {*OWN, "existing_project", "human_rankings", "lora", "multi_node", "rankings", "sweep"}
    assert larger | short == {path.name for path in EXAMPLES.iterdir() if path.is_dir()}


def test_own_class_trains_by_the_command_line(example: str, ppo: Arguments, workplace: Path) -> None:
    overlay = EXAMPLES / example / f"{example}.yaml"
    changes = {"model__reward__path": None} if example == "own_reward" else {}
    arguments = ppo(**changes)
    cli = main(["fit", *arguments[:2], "--config", str(overlay), *arguments[2:]])
    name = example.removeprefix("own_")
    part = getattr(cli.model if name == "reward" else cli.model.algorithm, name)
    assert type(part).__module__ == example
    assert cli.model.iteration == 2


def test_overlay_s_argument_arrives(ppo: Arguments, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = load("own_surrogate", monkeypatch)
    overlay = str(EXAMPLES / "own_surrogate" / "own_surrogate.yaml")
    assert main(["fit", *ppo(), "--config", overlay]).model.algorithm.surrogate == own.SoftClip(epsilon=0.1)


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


class Chosen:
    """A trial of Optuna's, whose values are given; it knows the ranges it was asked for."""

    def __init__(self, **values: Any) -> None:
        self.values, self.ranges = values, {}

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.ranges[name] = (low, high, log)
        return self.values[name]

    def suggest_categorical(self, name: str, choices: list[str]) -> str:
        assert self.values[name] in choices
        return self.values[name]


def test_trial_of_a_sweep_is_a_run_with_its_values(
    ppo: Arguments, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials in one process; the best is read off the files of the run that its number names."""
    sweep, arguments = load("sweep", monkeypatch), ppo()
    given = [*arguments[:2], "--config", str(EXAMPLES / "sweep" / "sweep.yaml"), *arguments[2:]]
    trials = [Chosen(lr=1e-6, coef=0.05, surrogate="KLPen"), Chosen(lr=0.1, coef=0.01, surrogate="Clip")]
    values = [sweep.objective(trial, given) for trial in trials]
    assert trials[0].ranges == {"lr": (1e-7, 1e-5, True), "coef": (0.003, 0.1, True)}
    assert values[0] != values[1]
    for number, (trial, value) in enumerate(zip(trials, values, strict=True)):
        run = Path(f"runs/sweep/version_{number}")
        model = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
        assert model["optimizer"]["init_args"]["lr"] == trial.values["lr"]
        assert model["algorithm"]["init_args"]["beta"] == trial.values["coef"]
        assert model["algorithm"]["init_args"]["surrogate"]["class_path"].endswith(trial.values["surrogate"])
        last = [row for row in csv.DictReader((run / "metrics.csv").open(encoding="utf-8")) if row["eval/reward"]][-1]
        assert value == pytest.approx(float(last["eval/reward"]) - 0.02 * float(last["eval/kl"]), abs=1e-6)
    assert not list(Path().rglob("*.ckpt"))


def test_random_search_draws_within_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [load("sweep", monkeypatch).Draw(seed) for seed in range(200)]
    rates = [draw.suggest_float("lr", 1e-7, 1e-5, log=True) for draw in draws]
    assert all(1e-7 <= rate <= 1e-5 for rate in rates)
    assert 60 < sum(rate < 1e-6 for rate in rates) < 140  # half of the decades; a hundredth of the range without `log`
    assert {draw.suggest_categorical("surrogate", ["a", "b"]) for draw in draws} == {"a", "b"}


def test_win_rate_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = load("own_advantage", monkeypatch).WinRate()
    rewards = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 0.0], [-9.0, 0.0]])
    mask = torch.tensor([[True, False], [True, True], [True, False], [True, False]])
    credit = estimator(rewards, torch.zeros(4, 2), mask, groups=torch.arange(4), all_sum=lambda x: x)
    assert credit.advantages.tolist() == [[0.0, 0.0], [0.75, 0.75], [0.0, 0.0], [-0.75, 0.0]]


def rankings(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Scores by prompt and response, of a CSV with that text under its header."""
    own = load("human_rankings", monkeypatch)
    Path("given.csv").write_text("prompt,response,rater,rank\n" + text, encoding="utf-8")
    return {prompt: own.scores(raters) for prompt, raters in own.read("given.csv").items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p,a,r,1\np,b,r,2\np,c,r,3\n", {"a": 1.0, "b": 0.5, "c": 0.0}),
        ("p,a,r,1\np,b,r,1\np,c,r,2\n", {"a": 0.75, "b": 0.75, "c": 0.0}),  # a tie is half a vote
        ("p,a,r,1\np,b,r,2\np,a,s,2\np,b,s,1\n", {"a": 0.5, "b": 0.5}),  # one against the other
        ("p,a,r,1\np,b,r,2\np,a,s,1\np,b,s,2\np,a,t,2\np,b,t,1\n", {"a": 2 / 3, "b": 1 / 3}),
        # c was seen by one rater alone: what the others say of a and b does not move it against b, with which it ties
        ("p,a,r,1\np,b,r,2\np,c,r,2\np,a,s,1\np,b,s,2\n", {"a": 1.0, "b": 0.25, "c": 0.25}),
        ("p,a,r,1\n", {}),  # nothing to compare
    ],
)
def test_raters_vote_on_pairs(
    text: str, expected: dict[str, float], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rankings(text, monkeypatch) == {"p": pytest.approx(expected, abs=1e-12)}


def test_equal_shares_are_ties_to_the_bit(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss drops pairs of equal scores: three raters' thirds must not come out as 0.4999… and 0.5."""
    orders = ["abcd", "bcad", "cabd"]  # a circle above d
    text = "".join(f"p,{x},{order},{place}\n" for order in orders for place, x in enumerate(order))
    found = rankings(text, monkeypatch)["p"]
    assert found["a"] == found["b"] == found["c"] == pytest.approx(2 / 3)  # 2/3 and 1/3 in the circle, 1 against d


def test_rater_who_ranks_a_response_twice_is_named(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"given.csv:4: r ranks this response again"):
        rankings("p,a,r,1\np,b,r,2\np,a,r,2\n", monkeypatch)


def test_human_rankings_train_a_reward_model(tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands in the header: the CSV becomes rows, one a prompt, and these the batches of the reward model."""
    folder = EXAMPLES / "human_rankings"
    monkeypatch.setattr("sys.argv", ["human_rankings.py", str(folder / "rankings.csv"), "rankings.jsonl"])
    runpy.run_path(str(folder / "human_rankings.py"), run_name="__main__")
    monkeypatch.setattr("sys.argv", ["lightning-rlhf"])
    rows = [json.loads(line) for line in Path("rankings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"]: dict(zip(row["responses"], row["scores"], strict=True)) for row in rows} == {
        "Why is the sky blue?": {
            "Air scatters blue light more than red, so blue reaches us from all sides.": 0.875,
            "It reflects the sea.": 0.0,
            'Because of "Rayleigh" scattering.': 0.625,
        },
        "Name two prime numbers.": {"2\n3": 1.0, "4 and 6": 0.25, "7": 0.25},
        "Übersetze „cat“.": {"Katze": 0.5, "猫": 0.5},
    }  # and one response to "Say hello." says nothing
    stage = ["--config", str(EXAMPLES.parent / "configs/reward.yaml"), "--config", str(folder / "human_rankings.yaml")]
    small = tiny.small(EXAMPLES.parent / "configs/reward.yaml")
    model = main(["fit", *stage, f"--model.model.path={tiny.policy}", *small, "--data.batch_size=2"]).model
    assert model.loss == RankingLoss(margin=1.0)
    (batch,) = list(model.trainer.train_dataloader)  # of the three prompts one is all ties, and left out
    assert sorted(batch.rank.tolist()) == [[0, 1, 1], [0, 2, 1]]


@pytest.mark.slow
def test_qlora_trains_an_adapter_on_weights_of_four_bits(ppo: Arguments, workplace: Path) -> None:
    pytest.importorskip("bitsandbytes")
    arguments = ppo(trainer__precision="bf16-mixed", trainer__limit_train_batches=1)
    module = main(["fit", *arguments[:2], "--config", "qlora", *arguments[2:]]).model
    weights = {type(p).__name__ for name, p in module.policy.named_parameters() if "base_layer" in name}
    assert weights == {"Params4bit"}
    assert all("lora_" in name for name, p in module.policy.named_parameters() if p.requires_grad)


@pytest.mark.slow
def test_lora_trains_the_adapter_alone(ppo: Arguments, workplace: Path) -> None:
    """As on a GPU but for the device: bfloat16, checkpointing, the reference being the adapter off."""
    pytest.importorskip("peft")
    overlay = str(EXAMPLES / "lora" / "lora.yaml")
    arguments = ppo(trainer__precision="bf16-mixed", trainer__limit_train_batches=1)
    module = main(["fit", *arguments[:2], "--config", overlay, *arguments[2:]]).model
    adapter = {name: p for name, p in module.policy.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in module.policy.named_parameters() if not p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in adapter.items())
    assert all(p.dtype == torch.bfloat16 for p in frozen.values())
    assert module.collector.reference.frozen is None
    assert max(float(p.detach().abs().max()) for name, p in adapter.items() if "lora_B" in name) > 0  # they start at 0
    assert module.policy.network.is_gradient_checkpointing
    assert next(module.reward.model.parameters()).dtype == torch.bfloat16
    weights = sum(p.numel() for p in frozen.values()) + sum(p.numel() for p in adapter.values())
    memory = memory_estimate(module.trainer, module)  # as the header has it: 2 bytes a frozen weight, 16 an adapter's
    trained = sum(p.numel() for p in adapter.values())
    total = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert total * 2**30 == 2 * (weights - trained) + 16 * trained
    assert Path("runs/ppo/model/adapter_config.json").is_file()


def launched(file: str, program: str, workplace: Path, **environment: str) -> tuple[list[str], dict[str, str]]:
    """What a launch file starts, with a stand-in for `program`: its arguments and its environment."""
    stub = workplace / program
    stub.write_text('#!/bin/sh\nenv -0 > environment\nprintf "%s\\0" "$@" > arguments\n', encoding="utf-8")
    stub.chmod(0o755)
    command = ["bash", str(EXAMPLES / "multi_node" / file), "--data.train", "two words.jsonl"]
    path = f"{workplace}:{os.environ['PATH']}"
    subprocess.run(command, check=True, timeout=30, env=os.environ | {"PATH": path} | environment)
    arguments, variables = (Path(name).read_text("utf-8").split("\0")[:-1] for name in ("arguments", "environment"))
    return arguments, dict(variable.split("=", 1) for variable in variables)


def two_nodes_of_eight(fit: list[str], capsys: pytest.CaptureFixture[str], workplace: Path) -> None:
    """The command parses, keeps what was appended, and asks for what the launch files start."""
    for name in ("configs", "examples"):
        (workplace / name).symlink_to(EXAMPLES.parent / name)
    required = ["--model.policy.path=MODEL", "--model.reward.path=MODEL"]
    with pytest.raises(SystemExit) as stopped:
        main([*fit, *required, "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    trainer, data = printed["trainer"], printed["data"]["init_args"]
    assert (trainer["num_nodes"], trainer["devices"], trainer["strategy"]) == (2, 8, "ddp")
    assert data["train"] == "two words.jsonl"
    whole = yaml.safe_load((EXAMPLES.parent / "configs/ppo.yaml").read_text(encoding="utf-8"))
    processes = trainer["num_nodes"] * trainer["devices"]
    assert data["batch_size"] * processes == whole["data"]["init_args"]["batch_size"]
    minibatch = printed["model"]["init_args"]["updates"]["minibatch"]
    assert minibatch * processes == whole["model"]["init_args"]["updates"]["minibatch"]


def test_torchrun_starts_two_nodes_of_eight(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, _ = launched("torchrun.sh", "torchrun", workplace, MASTER_ADDR="node0")
    parsed = torchrun_parser().parse_args(arguments)
    assert (parsed.nnodes, parsed.nproc_per_node) == ("2", "8")
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("c10d", "node0:29500")
    assert (parsed.module, parsed.training_script) == (True, "lightning_rlhf")
    two_nodes_of_eight(parsed.training_script_args, capsys, workplace)


def test_slurm_starts_two_nodes_of_eight(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the file asks of SLURM passes the checks that Lightning makes in the job."""
    text = (EXAMPLES / "multi_node" / "slurm.sbatch").read_text(encoding="utf-8")
    asked = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(\S+)$", text))
    (script, *arguments), _ = launched("slurm.sbatch", "srun", workplace)
    assert script == "lightning-rlhf"
    nodes, tasks = int(asked["nodes"]), int(asked["ntasks-per-node"])
    assert int(asked["gpus-per-node"]) == tasks
    job = {"NTASKS": nodes * tasks, "NTASKS_PER_NODE": tasks, "NNODES": nodes, "JOB_NAME": asked["job-name"]}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    SLURMEnvironment().validate_settings(num_devices=8, num_nodes=2)
    two_nodes_of_eight(arguments, capsys, workplace)


def test_launch_by_hand_says_which_node_it_is(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/modules/test_modules_ddp.py lets this file start two nodes."""
    arguments, environment = launched("node_rank.sh", "lightning-rlhf", workplace, NODE_RANK="1", MASTER_ADDR="node0")
    known = [environment[name] for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert known == ["1", "node0", "29500"]
    two_nodes_of_eight(arguments, capsys, workplace)


@pytest.mark.parametrize("file", ["node_rank.sh", "torchrun.sh"])
def test_launch_without_an_address_says_so(file: str, workplace: Path) -> None:
    known = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "NODE_RANK")}
    command = ["bash", str(EXAMPLES / "multi_node" / file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=known | {"NODE_RANK": "0"})
    assert done.returncode != 0
    assert "MASTER_ADDR: address of node 0" in done.stderr


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


REAL = {
    "demonstrations": [{"prompt": f"{x} b", "response": "c d e"} for x in "abcd"],
    "prompts": [{"prompt": f"{x} y"} for x in "abcdefgh"],
    "rankings": [
        {"prompt": f"{x} b", "responses": ["c d", "e", "f g h"], "scores": [0.5, 0.0, 1e-6], "systems": ["A", "B", "C"]}
        for x in "abcdefgh"
    ],
}


def test_rankings_run_all_stages_and_report(tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in the header, on a handful of rows in its format: the report is of what the stages left behind."""
    for name, rows in REAL.items():
        for split in ("train", "val"):
            Path(f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    small = {"limit_train_batches": 1, "precision": "32-true", "accelerator": "cpu", "enable_progress_bar": False}
    flags = [f"--trainer.{name}={str(value).lower()}" for name, value in small.items()]
    monkeypatch.setattr("sys.argv", ["rankings.py", ".", tiny.policy, *flags, "--model.optimizer.lr=0.05"])
    runpy.run_path(str(EXAMPLES / "rankings" / "rankings.py"), run_name="__main__")
    assert all(list(Path(f"runs/rankings/{stage}").rglob("metrics.csv")) for stage in ("sft", "reward", "ppo"))
    header, *lines = Path("runs/rankings/report.csv").read_text("utf-8").splitlines()
    assert header == "measure,model or PPO,longer wins or SFT"
    found = {name: [float(x) for x in numbers] for name, *numbers in (line.split(",") for line in lines)}
    reward = LearnedReward("runs/rankings/reward/model", prompt_role="user")
    reward.prepare(None)
    right: dict[str, list[bool]] = {name: [] for name in ("", "/A", "/B", "/C")}
    for row in REAL["rankings"]:
        a, b, c = reward.score([row["prompt"]] * 3, row["responses"]).tolist()
        for names, correct in (("AC", a > c), ("AB", a > b), ("CB", c > b)):  # A over C over B
            for name in ("", *(f"/{one}" for one in names)):
                right[name].append(correct)
    for name, longer_wins in {"": 2 / 3, "/A": 1 / 2, "/B": 1, "/C": 1 / 2}.items():  # C's answers are the longest
        expected = [sum(right[name]) / len(right[name]), longer_wins]
        assert found[f"eval/accuracy{name}"] == pytest.approx(expected, abs=6e-4)  # of three digits
    sft, ppo = (read_rows(f"runs/rankings/{name}.jsonl") for name in ("sft", "ppo"))
    for name in ("score", "kl", "length", "ended"):
        expected = [np.mean([row[name] for row in rows]) for rows in (ppo, sft)]
        assert found[name] == pytest.approx(expected, abs=6e-4)
    gain, longer = (np.subtract([row[key] for row in ppo], [row[key] for row in sft]) for key in ("score", "length"))
    expected = [gain.mean(), gain.std(ddof=1) / np.sqrt(len(gain))]
    assert found["gain and its standard error"] == pytest.approx(expected, abs=6e-4)
    slope, _ = np.polyfit(longer, gain, 1)
    assert found["gain that goes with length"] == pytest.approx([slope * longer.mean()], abs=6e-4)
    assert abs(slope * longer.mean()) > 2e-3  # the policies differ


def read_rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# Arithmetic


def test_sums_are_split_by_their_operands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("reasoning_gym")
    sums = load_of("arithmetic", "sums", monkeypatch)
    files = sums.prepare(tmp_path)
    rows = {name: [json.loads(line) for line in path.read_text().splitlines()] for name, path in files.items()}
    pairs = {name: {sums.operands(row["prompt"]) for row in part} for name, part in rows.items()}
    assert sum(map(len, rows.values())) == 200
    assert not pairs["train"] & pairs["val"]
    assert (len(pairs["train"]), len(pairs["val"])) == (44, 11)
    assert {row["prompt"] for row in rows["train"]}.isdisjoint(row["prompt"] for row in rows["val"])


def load_of(folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES / folder)
    return import_module(name)


@pytest.mark.parametrize("method", ["grpo", "dynamic"])
def test_arithmetic_trains_and_its_curve_is_read(
    method: str, tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both methods on a tiny network: as many tokens as were drawn, and a plot of the pass rates."""
    pytest.importorskip("reasoning_gym")
    sums = load_of("arithmetic", "sums", monkeypatch)
    run = runpy.run_path(str(EXAMPLES / "arithmetic" / "run.py"))
    files = sums.prepare(Path("data"))
    config = EXAMPLES.parent / "configs" / "grpo.yaml"
    words = [f"--config={config}", f"--config={EXAMPLES / 'arithmetic' / 'arithmetic.yaml'}"]
    words += [f"--run=runs/arithmetic/{method}-0", f"--model.policy.path={tiny.policy}", "--data.prompt_role=null"]
    words += [f"--data.{part}={path}" for part, path in files.items()]
    main(["fit", *words, *run["METHODS"][method], "--trainer.max_steps=2", "--trainer.limit_train_batches=1"])
    (first, second) = run["curve"](method, 0)
    assert (first["rollouts"], second["rollouts"]) == (1, 2)
    assert 0 < first["tokens"] < second["tokens"]
    if method == "dynamic":
        assert first["tokens"] > 64  # nothing is solved, and four batches are drawn
    plot = load_of("arithmetic", "plot", monkeypatch)
    plot.plot([{"method": method, "seed": 0} | point for point in (first, second)], Path("curves.png"))
    assert Path("curves.png").stat().st_size > 1000


# Calculator


def test_calculator_computes_and_refuses_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = load_of("calculator", "problems", monkeypatch)
    assert [problems.calculator(text) for text in ("347 * 28", "-(3 + 4) / 2", "0.1 + 0.2")] == ["9716", "-3.5", "0.3"]
    for text in ("__import__('os')", "2 ** 9", "'a' * 3", "1 +", "1 " * 60):
        with pytest.raises((ValueError, SyntaxError)):
            problems.calculator(text)
    said = ["It is 9,716.", "12 and 9716", "9716 or 12", "none", "-9716"]
    assert problems.correct([""] * 5, said, answer=["9716"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_problems_of_the_calculator_are_split(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = load_of("calculator", "problems", monkeypatch)
    files = {name: read_rows(str(path)) for name, path in problems.prepare(Path("data"), seed=0).items()}
    assert {name: len(rows) for name, rows in files.items()} == {"demonstrations": 96, "val": 60, "train": 2000}
    assert {row["expression"] for row in files["train"]}.isdisjoint(row["expression"] for row in files["val"])
    assert all(problems.calculator(row["expression"]) == row["answer"] for row in files["train"])
    shown = "".join(row["prompt"][0]["content"] for row in files["demonstrations"])
    assert "boxes" not in shown
    assert "boxes" in "".join(row["prompt"] for row in files["train"])


def test_calculator_trains_and_its_curve_is_read(
    tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The example's config on a tiny network, which calls nothing: every episode has one turn, and each is scored."""
    problems = load_of("calculator", "problems", monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLES / "arithmetic")
    run = runpy.run_path(str(EXAMPLES / "calculator" / "run.py"))
    files = problems.prepare(Path("data"), seed=0)
    config = EXAMPLES.parent / "configs" / "grpo.yaml"
    words = [f"--config={config}", f"--config={EXAMPLES / 'calculator' / 'calculator.yaml'}", "--data.prompt_role=null"]
    words += [f"--model.policy.path={tiny.policy}", "--model.environment.prompt_role=null"]
    words += [f"--data.{part}={files[part]}" for part in ("train", "val")]
    main(["validate", *words, "--run=runs/calculator/before-0"])
    main(["fit", *words, "--run=runs/calculator/seed-0", "--trainer.max_steps=1", "--trainer.limit_train_batches=1"])
    before, after = run["curve"](0)
    assert (before["rollouts"], after["rollouts"]) == (0, 1)
    assert before["minutes"] == 0 < after["minutes"]
    assert before["turns"] == after["turns"] == 1
    run["plot"]([{"seed": seed} | point for seed in run["SEEDS"] for point in (before, after)], Path("curves.png"))
    assert Path("curves.png").stat().st_size > 1000
