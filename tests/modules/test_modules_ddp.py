"""Two processes with half the batch each train what one process trains: replicas under DDP, shards under FSDP2."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from agreement import assert_same_folder, assert_same_numbers
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
LAYERS = 1  # test_modules_fsdp2.py has networks of two
SCARCE = "scarce,scarce_sft,scarce_ppo,scarce_labels"
NAMES = f"ppo,gae,lora,resumed,episodes,moving,sft,reward,preference,cached,labels,{SCARCE},grouped,selected,distilled"
JOBS = [
    f"one:1:{NAMES}:120",
    f"ddp:2:{NAMES}:120",
    f"fsdp2:2:{NAMES}:150",
    "nodes:2:ppo,reward:40",
    "failing:2:failing:40",
    "leaving:2:leaving:40",
]


@pytest.fixture(scope="module")
def outcomes(outcome) -> Callable[[str, str], tuple[dict, dict]]:
    """What came out of one process and of two, by name of the run and strategy of the two."""
    return lambda name, strategy: (outcome(name, "one"), outcome(name, strategy))


@pytest.fixture(params=["ddp", "fsdp2"])
def strategy(request) -> str:
    """Of the two processes."""
    return request.param


@pytest.mark.parametrize("name", ["ppo", "gae", "lora", "sft", "reward", "preference"])
def test_two_processes_train_the_weights_of_one(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["ppo", "gae", "lora", "sft", "reward", "preference"])
def test_two_processes_log_what_one_logs(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert len(one["steps"]) == len(two["steps"]) >= 3
    for a, b in zip(one["steps"], two["steps"], strict=True):
        # the norm before clipping and the means of an iteration; "eval/…" of the epoch before come in later
        assert_same_numbers(
            {k: v for k, v in a.items() if not k.startswith("eval/")},
            {k: v for k, v in b.items() if not k.startswith("eval/")},
        )


def test_two_processes_play_the_episodes_of_one(outcomes, strategy):
    """With random environments, some of which fail; a run that is resumed plays those of one that was not stopped."""
    one, two = outcomes("episodes", strategy)
    for name in ("whole", "resumed"):
        assert one[name]["n"] == two[name]["n"]
        assert float((one[name]["weights"] - two[name]["weights"]).abs().max()) < 1e-9
        for a, b in zip(one[name]["steps"], two[name]["steps"], strict=True):
            assert_same_numbers(a, b)
    for run in (one, two):
        assert torch.equal(run["whole"]["weights"], run["resumed"]["weights"])
        assert max(step["objective/failed"] for step in run["whole"]["steps"]) > 0
        assert max(step["objective/turns"] for step in run["whole"]["steps"]) > 1
        assert not torch.equal(run["whole"]["weights"], run["first"]["weights"])


@pytest.mark.parametrize("name", ["ppo", "lora", "sft", "reward", "preference"])
def test_two_processes_evaluate_as_one(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert one["eval"]
    assert_same_numbers(one["eval"], two["eval"])


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


METHODS = ["grpo", "batch_std", "dr_grpo", "masked", "rloo", "reinforce_pp", "running_mean"]


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


def test_two_processes_distill_as_one(outcomes, strategy):
    """Whole replicas sum from hidden states, shards from logits."""
    one, two = outcomes("distilled", strategy)
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert_same_numbers(a, b)
    assert one["bonus"] == pytest.approx(two["bonus"], abs=1e-9)
    assert one["steps"][0]["loss/kl_avg"] > 1e-3


@pytest.mark.parametrize("name", ["refilled", "short"])
def test_two_processes_learn_from_the_prompts_of_one(outcomes, folder, strategy, name):
    """Which groups differ, how many batches are drawn for them, what rests."""
    one, two = (found[name] for found in outcomes("selected", strategy))
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert_same_numbers(a, b)
    batches = {step["filter/batches"] for step in one["steps"]}
    assert max(batches) > 1 if name == "refilled" else batches == {1.0}
    assert one["selection"]["taken"] == two["selection"]["taken"] > 0
    assert {k: v.tolist() for k, v in one["selection"]["rates"].items()} == {
        k: v.tolist() for k, v in two["selection"]["rates"].items()
    }
    logs = [(folder / f"selected-{name}-{kind}" / "rollouts.jsonl").read_text() for kind in ("one", strategy)]
    texts = [[json.loads(line)["response"] for line in log.splitlines()] for log in logs]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("name", "lines"), [("rollouts", 24), ("samples", 2 * 11)])
def test_two_processes_keep_the_log_of_one(outcomes, folder, strategy, name, lines):
    """Line by line in one order; two responses to each prompt, an odd number of held-out prompts."""
    outcomes("grouped", strategy)
    one, two = (folder / f"rloo-{kind}" / f"{name}.jsonl" for kind in ("one", strategy))
    pairs = list(zip(one.read_text().splitlines(), two.read_text().splitlines(), strict=True))
    assert len(pairs) == lines
    for a, b in (map(json.loads, pair) for pair in pairs):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value), key
    order = "episode" if name == "rollouts" else "index"
    assert [json.loads(b)[order] for _, b in pairs][-1] == (23 if name == "rollouts" else 10)


def test_masks_act_in_what_two_processes_train(outcomes):
    """On tokens of the whole rollout, and on responses that did not end."""
    for step in outcomes("grouped", "ddp")[1]["masked"]["steps"]:
        assert 0.5 < step["policy/masked"] < 0.7
        assert step["objective/uncounted"] == pytest.approx(1 - step["objective/eos_rate"], abs=1e-9)
    assert any(step["objective/uncounted"] > 0 for step in outcomes("grouped", "ddp")[1]["masked"]["steps"])


def test_methods_train_differently(outcomes):
    """Or equal weights above would say nothing of them."""
    found, _ = outcomes("grouped", "ddp")
    for i, first in enumerate(METHODS):
        for second in METHODS[:i]:
            assert float((found[first]["weights"] - found[second]["weights"]).abs().max()) > 1e-4


def test_two_processes_adapt_as_one(outcomes, strategy):
    one, two = outcomes("ppo", strategy)
    assert (one["n"], one["b"]) == (two["n"], two["b"])
    assert one["kl"] == pytest.approx(two["kl"], abs=1e-9)
    assert one["kl"] != 0.2
    assert one["b"] != 1.0


def test_two_processes_find_one_bias(outcomes, strategy):
    one, two = outcomes("reward", strategy)
    assert one["bias"] == pytest.approx(two["bias"], abs=1e-6)  # the mean is accumulated in float32
    assert abs(one["bias"]) > 1e-3


def test_two_processes_share_what_the_reference_said(outcomes, folder, strategy):
    """Each text is read once by one of them, in the first epoch; shards make as many passes on both."""
    one, two = outcomes("cached", strategy)
    assert one["passes"] == [[32, 0, 0]]  # responses in the file
    assert [epochs[1:] for epochs in two["passes"]] == [[0, 0], [0, 0]]
    first = [epochs[0] for epochs in two["passes"]]
    assert sum(first) == 32 if strategy == "ddp" else first[0] == first[1] < 32
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["labels", "scarce_labels"])
def test_two_processes_learn_from_labels_and_evaluate_as_one(outcomes, strategy, name):
    """KTO's KL is of the pairs of the whole batch, above 0 here. Fillers count nowhere and do not hang."""
    one, two = outcomes(name, strategy)
    assert min(step["train/kl"] for step in one["steps"]) > 0.01
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert b["train/kl"] == pytest.approx(a["train/kl"], abs=1e-9)
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
    assert {"eval/loss", "eval/chosen_reward"} <= one["eval"].keys()
    assert_same_numbers(one["eval"], two["eval"])


def test_two_processes_know_the_systems_of_both(outcomes, strategy):
    """One of them alone holds the prompts of even number, each with a system of its own; the numbers are compared."""
    _, two = outcomes("reward", strategy)
    named = {key.rpartition("/")[2] for key in two["eval"] if key.startswith("eval/pairs/")}
    assert named == {"odd", "all", "last", *(f"{prompt} even" for prompt in "adhnqu")}


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_rank_without_a_row_to_evaluate_counts_nowhere(outcomes, strategy, name):
    one, two = outcomes(f"scarce_{name}", strategy)
    assert one["eval"]
    assert_same_numbers(one["eval"], two["eval"])


def test_rank_without_a_row_to_evaluate_does_not_hang(outcomes, strategy):
    """The reward model has collectives of its own: the mean of the demonstrations, the accuracy; FSDP2 its passes."""
    one, two = outcomes("scarce", strategy)
    assert two["biases"].tolist() == pytest.approx([one["bias"]] * 2, abs=1e-6)
    assert_same_numbers(one["eval"], two["eval"])


@pytest.mark.parametrize("name", ["sft", "reward", "lora", "preference"])
def test_two_processes_export_the_folder_of_one(outcomes, folder, strategy, name):
    outcomes(name, strategy)
    one, two = (folder / f"{name}-{kind}" for kind in ("one", strategy))
    first = assert_same_folder(one, two, atol=1e-9)
    start = load_file(folder / ("scorer" if name == "reward" else "lm") / "model.safetensors")
    assert any(float((first[key] - start[key]).abs().max()) > 1e-3 for key in first)  # not the weights it began with


def test_two_processes_move_the_reference_of_one(outcomes, strategy):
    """Without a stop, resumed, and resumed from the checkpoint of one process; shard by shard under FSDP2."""
    one, two = outcomes("moving", strategy)
    for name in ("whole", "resumed", "from_one"):
        for key, weight in one["whole"]["end"].items():
            assert float((two[name]["end"][key] - weight).abs().max()) < 1e-9
        assert float((two[name]["weights"] - one["whole"]["weights"]).abs().max()) < 1e-9
        assert_same_numbers(one[name]["eval"], two[name]["eval"])
    for key, weight in two["first"]["end"].items():
        assert torch.equal(two["resumed"]["start"][key], weight)
        assert torch.equal(two["from_one"]["start"][key], one["first"]["end"][key])
    assert any(
        float((two["first"]["end"][key] - start).abs().max()) > 1e-3 for key, start in two["first"]["start"].items()
    )


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


def test_two_nodes_train_what_one_process_trains(outcomes):
    """The same command once on each node, which knows its rank and where the first is; here both are one machine."""
    for name in ("ppo", "reward"):
        one, two = outcomes(name, "nodes")
        assert float((one["weights"] - two["weights"]).abs().max()) < 1e-9
        for a, b in zip(one["steps"], two["steps"], strict=True):
            assert_same_numbers(
                {k: v for k, v in a.items() if k[:5] != "eval/"}, {k: b[k] for k in a if k[:5] != "eval/"}
            )


def test_reward_that_fails_on_one_process_ends_all(folder, outcome):
    """Neither waits for the other; each says why, and what was asked of the reward is kept."""
    outcome("ppo", "one")  # the jobs have run
    assert json.loads((folder / "failing.json").read_text())["statuses"] == [1, 1]
    first, second = ((folder / f"failing-{rank}.log").read_text().rstrip().splitlines()[-1] for rank in (0, 1))
    assert "RewardError: rollout 1: the reward failed on another process" in first
    assert "RewardError: rollout 1: the reward failed with KeyError: 'judge'" in second
    (kept,) = (folder / "failed-rewards").glob("rollout-1.*.jsonl")
    assert len(kept.read_text().splitlines()) == 2


def test_processes_that_share_a_model_make_the_same_passes(outcome):
    """In every rollout; replicas make as many as their own rows need, which differ in one: the negative control."""
    alone, together = outcome("lora", "ddp")["passes"], outcome("lora", "fsdp2")["passes"]
    assert len(alone[0]) == 3
    assert alone[0] != alone[1]
    assert together[0] == together[1]
    assert all(most >= max(own) for most, own in zip(together[0], zip(*alone, strict=True), strict=True))


def test_signal_to_one_process_saves_and_ends_all(folder, outcome):
    """After the rollout in which it came, though nothing was to be saved yet."""
    outcome("ppo", "one")  # the jobs have run
    assert json.loads((folder / "leaving.json").read_text())["statuses"] == [143, 143]
    assert [path.name for path in (folder / "leaving").iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "leaving" / "last.ckpt", weights_only=True)["rlhf"]["iteration"] == 2
