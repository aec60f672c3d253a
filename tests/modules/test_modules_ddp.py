"""Two processes with half the batch each train what one process trains: replicas under DDP, shards under FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("ddp_host.py")
PROMPTS = ["a b", "c", "d e f", "g", "h i", "j k l m", "n", "o p", "q r s", "t", "u"]  # 11: an odd number to evaluate
ENDS = list(range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_lm, make_scorer, make_tokenizer) -> Path:
    """Models and data."""
    folder = tmp_path_factory.mktemp("ddp")
    for name, network in {"lm": make_lm(end=ENDS), "scorer": make_scorer()}.items():
        network.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    files = {
        "prompts": [{"prompt": p} for p in PROMPTS],
        "texts": [{"text": p + " x y z"} for p in PROMPTS] * 3,
        "demonstrations": [{"prompt": p, "response": (p[::-1] + " v") * (1 + i % 2)} for i, p in enumerate(PROMPTS)],
        "comparisons": [
            {"prompt": p, "responses": ["v", "w x", "y", "z z z"][: 2 + i % 3], "ranks": [0, 1, 1, 2][: 2 + i % 3]}
            | {"systems": [f"{p[0]} even" if i % 2 == 0 else "odd", "all", "all", "last"][: 2 + i % 3]}
            for i, p in enumerate(PROMPTS)
        ],
    }
    files |= {f"one_{name[:-1]}": rows[:1] for name, rows in files.items()}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


NAMES = "ppo,gae,lora,resumed,sft,reward,scarce,scarce_sft,scarce_ppo,grouped"
JOBS = [
    f"one:1:{NAMES}:90",
    f"ddp:2:{NAMES}:90",
    f"fsdp2:2:{NAMES}:90",
    "nodes:2:ppo,reward:40",
    "one32:1:sft,reward,plain:40",
    "fsdp1:2:sft,reward:40",
    *(["zero2:2:sft,plain:100"] if find_spec("deepspeed") else []),
]


@pytest.fixture(scope="module")
def outcome(folder) -> Callable[[str, str], dict]:
    """What came out of the first process, by name of the run and strategy."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "LOCAL_RANK")}
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *JOBS],
        env=inherited | quiet,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    def of(name: str, strategy: str) -> dict:
        statuses = json.loads((folder / f"{strategy}.json").read_text())["statuses"]
        for rank, status in enumerate(statuses):
            log = (folder / f"{strategy}-{rank}.log").read_text()[-4000:]
            assert status is not None, f"hangs: {log}"
            assert status == 0, log
        return torch.load(folder / f"{name}-{strategy}.pt")

    return of


@pytest.fixture(scope="module")
def outcomes(outcome) -> Callable[[str, str], tuple[dict, dict]]:
    """What came out of one process and of two, by name of the run and strategy of the two."""
    return lambda name, strategy: (outcome(name, "one"), outcome(name, strategy))


@pytest.fixture(params=["ddp", "fsdp2"])
def strategy(request) -> str:
    """Of the two processes."""
    return request.param


def assert_same_numbers(one: dict[str, float], two: dict[str, float], *, rel: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=rel, abs=1e-7, nan_ok=True), name  # logged as float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "gae", "lora", "sft", "reward"])
def test_two_processes_train_the_weights_of_one(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "gae", "lora", "sft", "reward"])
def test_two_processes_log_what_one_logs(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert len(one["steps"]) == len(two["steps"]) >= 3
    for a, b in zip(one["steps"], two["steps"], strict=True):
        # the norm before clipping and the means of an iteration; "eval/…" of the epoch before come in later
        assert_same_numbers(
            {k: v for k, v in a.items() if not k.startswith("eval/")},
            {k: v for k, v in b.items() if not k.startswith("eval/")},
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "lora", "sft", "reward"])
def test_two_processes_evaluate_as_one(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert one["eval"]
    assert_same_numbers(one["eval"], two["eval"])


@pytest.mark.slow
def test_evaluations_were_among_what_two_processes_log(outcomes, strategy):
    (ppo, _), (lora, _) = (outcomes(name, strategy) for name in ("ppo", "lora"))
    names = {
        "win_rate",
        "win_rate_length_controlled",
        "judge",
        "judge_first",
        "best_of_3/reward",
        "best_of_n/equivalent",
    }
    assert {f"eval/{name}" for name in names | {"gold/reward", "gold/since_best", "alignment_tax"}} <= ppo[
        "eval"
    ].keys()
    assert {"eval/best_of_2/reward", "eval/alignment_tax"} <= lora["eval"].keys()
    assert ppo["eval"]["eval/win_rate"] != ppo["eval"]["eval/judge"]


METHODS = ["grpo", "batch_std", "dr_grpo", "rloo", "reinforce_pp", "running_mean"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_groups_as_one(outcomes, strategy, method):
    """Two responses to each prompt: the rows, the group statistics and the reductions."""
    one, two = (found[method] for found in outcomes("grouped", strategy))
    assert (one["n"], len(one["steps"])) == (two["n"], len(two["steps"])) == (24, 3)  # 3 rollouts of 4 · 2 responses
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert_same_numbers(a, b)
    assert {"eval/reward/long", "eval/reward/both", "eval/reward/both/spread"} <= one["eval"].keys()
    assert_same_numbers(one["eval"], two["eval"])
    assert one["kl"] == pytest.approx(two["kl"], abs=1e-9)
    assert one["advantage"] == pytest.approx(two["advantage"], abs=1e-9)
    assert bool(one["advantage"]) == (method == "running_mean")


@pytest.mark.slow
def test_methods_train_differently(outcomes):
    """Or equal weights above would say nothing of them."""
    found, _ = outcomes("grouped", "ddp")
    for i, first in enumerate(METHODS):
        for second in METHODS[:i]:
            assert float((found[first]["weights"] - found[second]["weights"]).abs().max()) > 1e-4


@pytest.mark.slow
def test_two_processes_adapt_as_one(outcomes, strategy):
    one, two = outcomes("ppo", strategy)
    assert (one["n"], one["b"]) == (two["n"], two["b"])
    assert one["kl"] == pytest.approx(two["kl"], abs=1e-9)
    assert one["kl"] != 0.2
    assert one["b"] != 1.0


@pytest.mark.slow
def test_two_processes_find_one_bias(outcomes, strategy):
    one, two = outcomes("reward", strategy)
    assert one["bias"] == pytest.approx(two["bias"], abs=1e-6)  # the mean is accumulated in float32
    assert abs(one["bias"]) > 1e-3


@pytest.mark.slow
def test_two_processes_know_the_systems_of_both(outcomes, strategy):
    """One of them alone holds the prompts of even number, each with a system of its own; the numbers are compared."""
    _, two = outcomes("reward", strategy)
    named = {key.rpartition("/")[2] for key in two["eval"] if key.startswith("eval/pairs/")}
    assert named == {"odd", "all", "last", *(f"{p[0]} even" for p in PROMPTS[::2])}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_rank_without_a_row_to_evaluate_counts_nowhere(outcomes, strategy, name):
    one, two = outcomes(f"scarce_{name}", strategy)
    assert one["eval"]
    assert_same_numbers(one["eval"], two["eval"])


@pytest.mark.slow
def test_rank_without_a_row_to_evaluate_does_not_hang(outcomes, strategy):
    """The reward model has collectives of its own: the mean of the demonstrations, the accuracy; FSDP2 its passes."""
    one, two = outcomes("scarce", strategy)
    assert two["biases"].tolist() == pytest.approx([one["bias"]] * 2, abs=1e-6)
    assert_same_numbers(one["eval"], two["eval"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "reward", "lora"])
def test_two_processes_export_the_folder_of_one(outcomes, folder, strategy, name):
    outcomes(name, strategy)
    one, two = (folder / f"{name}-{kind}" for kind in ("one", strategy))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()} >= {"model.safetensors"}
    assert json.loads((two / "config.json").read_text()).get("demonstration_bias") == pytest.approx(
        json.loads((one / "config.json").read_text()).get("demonstration_bias"), abs=1e-6
    )
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=1e-9) for key in first)
    start = load_file(folder / ("scorer" if name == "reward" else "lm") / "model.safetensors")
    assert any(float((first[key] - start[key]).abs().max()) > 1e-3 for key in first)  # not the weights it began with


@pytest.mark.slow
def test_two_processes_resume_as_if_they_had_not_stopped(outcomes, strategy):
    one, two = outcomes("resumed", strategy)
    for found in (one, two):
        assert torch.equal(found["whole"]["weights"], found["resumed"]["weights"])
        assert (found["whole"]["kl"], found["whole"]["n"]) == (found["resumed"]["kl"], found["resumed"]["n"])
    assert float((one["resumed"]["weights"] - two["resumed"]["weights"]).abs().max()) < 1e-9
    averages = [found[name]["average"] for found in (one, two) for name in ("whole", "resumed")]
    for average in averages[1:]:
        assert average.keys() == averages[0].keys()
        assert all(torch.allclose(average[key], averages[0][key], rtol=0, atol=1e-9) for key in average)
    assert float((one["first"]["weights"] - one["resumed"]["weights"]).abs().max()) > 1e-3


def assert_trained_alike(one: dict, two: dict) -> None:
    """Every step's numbers and the evaluation, in float32."""
    assert len(one["steps"]) == len(two["steps"]) >= 4
    for a, b in zip([*one["steps"], one["eval"]], [*two["steps"], two["eval"]], strict=True):
        assert_same_numbers(a, b, rel=1e-5)


@pytest.mark.slow
def test_fsdp1_trains_sft_and_reward_models_as_one_process(outcome):
    """On a stand-in for a CPU; the weights are shards, so what is compared is what they say of the data."""
    for name in ("sft", "reward"):
        assert_trained_alike(outcome(name, "one32"), outcome(name, "fsdp1"))


@pytest.mark.slow
def test_deepspeed_zero2_trains_as_one_process(outcome, folder):
    """Two networks, PTX, clipping by `updates.max_grad_norm` alone, the norm before it, the exported folder."""
    pytest.importorskip("deepspeed")
    for name in ("sft", "plain"):
        one, two = outcome(name, "one32"), outcome(name, "zero2")
        assert float((one["weights"] - two["weights"]).abs().max()) < 1e-5
        assert_trained_alike(one, two)
    assert max(step["policy/grad_norm"] for step in one["steps"]) > 1.0  # so that it was clipped
    first, second = (load_file(folder / f"sft-{kind}" / "model.safetensors") for kind in ("one32", "zero2"))
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=1e-5) for key in first)


@pytest.mark.slow
def test_two_nodes_train_what_one_process_trains(outcomes):
    """The same command once on each node, which knows its rank and where the first is; here both are one machine."""
    for name in ("ppo", "reward"):
        one, two = outcomes(name, "nodes")
        assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
        for a, b in zip(one["steps"], two["steps"], strict=True):
            assert_same_numbers(
                {k: v for k, v in a.items() if k[:5] != "eval/"}, {k: b[k] for k in a if k[:5] != "eval/"}
            )
