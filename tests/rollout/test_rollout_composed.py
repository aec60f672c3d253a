"""Rewards made of several: sums and ensembles by hand, the names of their parts, members of every kind, YAML."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from gathered import gathered
from torch import nn

from lightning_rlhf.cli import main
from lightning_rlhf.core import (
    Algorithm,
    ConstantSchedule,
    MeanReward,
    TruncatedScore,
    UncertaintyWeighted,
    WorstReward,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import (
    EnsembleReward,
    FunctionReward,
    LearnedReward,
    ModuleReward,
    Reward,
    TextReward,
    WeightedReward,
)
from lightning_rlhf.rollout.clock import Clock
from lightning_rlhf.rollout.responder import Responder

PROMPTS = [[10, 11], [12], [13, 14]]
RESPONSES = [[15, 16, 0], [17], [18, 0]]
ROWS = [{"prompt": "a b", "answer": 1.5}, {"prompt": "c", "answer": -2.0}, {"prompt": "d e", "answer": 0.25}]
RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11]]


class Fixed(Reward):
    """The numbers it was given, in turn."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = torch.tensor(numbers, dtype=torch.float64)

    def __call__(self, rollout, rows):
        return self.numbers[: len(rows)]


class Count(nn.Module):
    """Real tokens of a text, times a scale."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, tokens, mask):
        return self.scale * mask.sum(1)


def answers(prompts, responses, answer):
    return answer


@pytest.fixture
def rollout(make_rollout):
    return make_rollout(PROMPTS, RESPONSES)


# Weighted sums


def test_weighted_sum_is_counted_by_hand(rollout):
    parts = {"a": Fixed(1.0, -2.0, 0.5), "b": Fixed(0.1, 0.2, 0.3)}
    scores = WeightedReward(parts, weights={"a": 2.0, "b": -10.0}).scored(rollout, ROWS)
    assert scores.total.tolist() == pytest.approx([2 * 1 - 1, -4 - 2, 1 - 3], abs=1e-12)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "a": [1.0, -2.0, 0.5],  # before their weights
        "b": [0.1, 0.2, 0.3],
    }
    turned = WeightedReward(parts, weights={"a": -10.0, "b": 2.0}).scored(rollout, ROWS)
    assert turned.total.tolist() != scores.total.tolist()


def test_without_weights_it_is_the_sum(rollout):
    reward = WeightedReward({"a": Fixed(1.0, -2.0, 0.5), "b": Fixed(0.1, 0.2, 0.3)})
    assert reward(rollout, ROWS).tolist() == pytest.approx([1.1, -1.8, 0.8], abs=1e-12)
    assert reward.weights == {"a": 1.0, "b": 1.0}


def test_order_of_the_weights_is_no_matter(rollout):
    parts = {"a": Fixed(1.0, -2.0, 0.5), "b": Fixed(0.1, 0.2, 0.3)}
    one, two = WeightedReward(parts, {"a": 3.0, "b": 5.0}), WeightedReward(parts, {"b": 5.0, "a": 3.0})
    assert torch.equal(one(rollout, ROWS), two(rollout, ROWS))


@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}, {}],
    ids=["few", "many", "other", "no"],
)
def test_weights_of_other_names_are_refused(weights):
    with pytest.raises(ValueError, match=r"`weights` must name the parts \['a', 'b'\]: got"):
        WeightedReward({"a": Fixed(1.0), "b": Fixed(1.0)}, weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(weight):
    with pytest.raises(ValueError, match="`weights` must be finite"):
        WeightedReward({"a": Fixed(1.0)}, {"a": weight})
    assert WeightedReward({"a": Fixed(1.0)}, {"a": 0.0}).weights == {"a": 0.0}


def test_too_few_members_are_refused():
    with pytest.raises(ValueError, match="WeightedReward needs at least one reward"):
        WeightedReward({})
    for few in ([], [Fixed(1.0)]):
        with pytest.raises(ValueError, match=f"`rewards` must hold at least 2 members: got {len(few)}"):
            EnsembleReward(few)


def test_member_that_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="`reward` must be a Reward, an nn.Module or a function"):
        WeightedReward({"a": Fixed(1.0), "b": 3.0})


# Members


def test_members_of_every_kind(rollout, toy_tokenizer):
    """A reward, a module on token ids, a function of text with columns; of other precisions."""

    class Words(TextReward):
        def score(self, prompts, responses, **columns):
            return [len(response.split()) for response in responses]

    reward = WeightedReward({"fixed": Fixed(1.0, 2.0, 3.0), "module": Count(), "function": answers, "text": Words()})
    kinds = [type(member) for member in reward.members.values()]
    assert kinds == [Fixed, ModuleReward, FunctionReward, Words]
    reward.prepare(toy_tokenizer)
    scores = reward.scored(rollout, ROWS)
    # real tokens: prompt + response; words: without the end token
    by_hand = {"fixed": [1, 2, 3], "module": [5, 2, 4], "function": [1.5, -2.0, 0.25], "text": [2, 1, 1]}
    assert {name: part.tolist() for name, part in scores.parts.items()} == by_hand
    assert scores.total.tolist() == [9.5, 3.0, 8.25]


def test_members_are_prepared_and_their_networks_forwarded(toy_tokenizer):
    one, two, three = Count(), Count(2.0), Count(3.0)
    inner = EnsembleReward([one, two])
    reward = WeightedReward({"inner": inner, "three": three, "function": answers})
    assert reward.networks() == [one, two, three]
    assert not any(p.requires_grad for network in reward.networks() for p in network.parameters())
    assert not any(network.training for network in reward.networks())
    reward.prepare(toy_tokenizer)
    members = [reward, inner, *inner.members.values(), *reward.members.values()]
    assert all(member.tokenizer is toy_tokenizer for member in members)


def test_networks_of_members_move_with_the_module_and_stay_out_of_it(make_lm, make_trainer, as_loader, left_padded):
    reward = WeightedReward({"a": Count(), "b": EnsembleReward([Count(), Count(2.0)])})
    module = PPOModule(make_lm(), reward, generation=SamplingParams(max_new_tokens=3), schedule=ConstantSchedule())
    trainer = make_trainer(precision="64-true")
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    assert [network.scale.dtype for network in reward.networks()] == [torch.float64] * 3
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}


def test_error_of_a_member_names_it(rollout, toy_tokenizer):
    def broken(prompts, responses):
        return [1.0, math.nan, 2.0]

    reward = WeightedReward({"good": Fixed(1.0, 1.0, 1.0), "bad": broken})
    reward.prepare(toy_tokenizer)
    with pytest.raises(ValueError, match="broken returned nan for response 1"):
        reward(rollout, ROWS)
    with pytest.raises(ValueError, match="no tokenizer"):
        WeightedReward({"bad": broken})(rollout, ROWS)


def test_members_leave_no_gradient(rollout):
    scale = torch.ones(3, requires_grad=True)

    class Careless(Reward):
        def __call__(self, rollout, rows):
            return 2.0 * scale

    ranks = SimpleNamespace(all=lambda fine: fine, folder=Path())
    collector = SimpleNamespace(
        reward=WeightedReward({"a": Careless()}), clock=Clock(), ranks=ranks
    )  # nothing is built
    responder = Responder(collector=collector, algorithm=Algorithm(), tokenizer=None)
    scores = responder.score(rollout, SimpleNamespace(rows_of=lambda _: ROWS), iteration=0)
    assert not scores.total.requires_grad


def test_ensemble_takes_whole_numbers(rollout):
    class Whole(Reward):
        def __call__(self, rollout, rows):
            return torch.tensor([1, 2, 4])

    assert WeightedReward({"a": Whole()})(rollout, ROWS).tolist() == [1.0, 2.0, 4.0]
    assert EnsembleReward([Whole(), Whole()])(rollout, ROWS).tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("name", ["a/b", "/", "style/brief"])
def test_names_that_could_collide_are_refused(rollout, name):
    """A part called `a/b` and the part `b` of `a` would share one logged name."""
    with pytest.raises(ValueError, match=r"^names of rewards must hold no '/'.*got \['" + name):
        WeightedReward({"a": Fixed(1.0, 1.0, 1.0), name: Fixed(5.0, 5.0, 5.0)})
    inner = WeightedReward({"b": Fixed(1.0, 1.0, 1.0)})
    reward = WeightedReward({"a": inner, "a.b": Fixed(5.0, 5.0, 5.0)})
    assert reward.scored(rollout, ROWS).parts.keys() == {"a", "a.b", "a/b"}


# Ensembles


MEMBERS = [(1.0, -2.0, 0.5), (3.0, -2.0, -0.5), (2.0, 4.0, 0.0)]
MEANS = [2.0, 0.0, 0.0]
VARIANCES = [2 / 3, 8.0, 0.5 / 3]  # biased: (1 + 1 + 0)/3, (4 + 4 + 16)/3, (0.25 + 0.25 + 0)/3
COMBINED = {
    "mean": (MeanReward(), MEANS),
    "worst": (WorstReward(), [1.0, -2.0, -0.5]),
    "uncertainty": (UncertaintyWeighted(coef=0.5), [m - 0.5 * v for m, v in zip(MEANS, VARIANCES, strict=True)]),
}


@pytest.mark.parametrize("name", COMBINED)
def test_ensemble_is_counted_by_hand(rollout, name):
    combine, expected = COMBINED[name]
    scores = EnsembleReward([Fixed(*numbers) for numbers in MEMBERS], combine=combine).scored(rollout, ROWS)
    assert scores.total.tolist() == pytest.approx(expected, abs=1e-12)
    assert scores.parts.keys() == {"member_0", "member_1", "member_2", "spread"}
    for i, numbers in enumerate(MEMBERS):
        assert scores.parts[f"member_{i}"].tolist() == list(numbers)
    assert scores.parts["spread"].tolist() == pytest.approx([math.sqrt(v) for v in VARIANCES], abs=1e-12)


def test_default_ensemble_is_the_mean(rollout):
    assert EnsembleReward([Fixed(*numbers) for numbers in MEMBERS])(rollout, ROWS).tolist() == pytest.approx(MEANS)


def test_members_that_agree_have_no_spread(rollout):
    for combine in (MeanReward(), WorstReward(), UncertaintyWeighted(coef=3.0)):
        scores = EnsembleReward([Fixed(1.0, -2.0, 0.5)] * 3, combine=combine).scored(rollout, ROWS)
        assert scores.total.tolist() == pytest.approx([1.0, -2.0, 0.5], abs=1e-12)
        assert scores.parts["spread"].tolist() == pytest.approx([0.0] * 3, abs=1e-12)


def test_nested_parts_are_named_by_their_path(rollout):
    ensemble = EnsembleReward([Fixed(1.0, 1.0, 1.0), Fixed(3.0, 5.0, 1.0)], combine=WorstReward())
    style = WeightedReward({"short": Fixed(1.0, 0.0, 0.0), "calm": Fixed(0.0, 2.0, 0.0)}, {"short": 1.0, "calm": 0.5})
    reward = WeightedReward({"help": ensemble, "style": style}, {"help": 1.0, "style": -1.0})
    scores = reward.scored(rollout, ROWS)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "help": [1.0, 1.0, 1.0],
        "help/member_0": [1.0, 1.0, 1.0],
        "help/member_1": [3.0, 5.0, 1.0],
        "help/spread": [1.0, 2.0, 0.0],
        "style": [1.0, 1.0, 0.0],
        "style/short": [1.0, 0.0, 0.0],
        "style/calm": [0.0, 2.0, 0.0],
    }
    assert scores.total.tolist() == [0.0, 0.0, 1.0]
    outer = EnsembleReward([reward, Fixed(2.0, 2.0, 2.0)]).scored(rollout, ROWS)
    assert "member_0/style/short" in outer.parts
    assert outer.total.tolist() == [1.0, 1.0, 1.5]


# What is logged


class Twice(Reward):
    """Twice the number of the row, in training and evaluation."""

    def __call__(self, rollout, rows):
        return torch.tensor([2.0 * row["number"] for row in rows])


class Lengths(Reward):
    def __call__(self, rollout, rows):
        return rollout.lengths.double()


@pytest.fixture
def module(make_lm):
    def make(reward, **options):
        usual = {"generation": SamplingParams(max_new_tokens=4), "schedule": ConstantSchedule(), "shaping": ()}
        usual |= {"optimizer": partial(torch.optim.SGD, lr=0.01)}
        return PPOModule(make_lm(end=list(range(10))).double(), reward, **gathered(**(usual | options)))

    return make


def nested():
    inner = WeightedReward({"lengths": Lengths(), "twice": Twice()}, {"lengths": 0.5, "twice": 1.0})
    return WeightedReward({"row": Twice(), "inner": inner}, {"row": 3.0, "inner": -1.0})


NAMES = {"row", "inner", "inner/lengths", "inner/twice"}
NUMBERED = [{"prompt": "p", "number": i} for i in range(len(RAGGED))]  # the mean is 2.5


@pytest.mark.parametrize("k", [1, 2])
def test_parts_are_logged_in_training_and_evaluation(module, make_trainer, as_loader, left_padded, recorder, k):
    batch = left_padded(RAGGED, rows=NUMBERED)
    built = module(nested(), generation=SamplingParams(max_new_tokens=4, samples_per_prompt=k))
    trainer = make_trainer(callbacks=[recorder], val_check_interval=1)
    trainer.fit(built, as_loader([{"prompts": batch}]), as_loader([batch]))
    logged, evaluated = recorder.steps[0], {name: float(x) for name, x in trainer.callback_metrics.items()}
    for found, total, prefix in (
        (logged, "objective/scores", "objective/response_length"),
        (evaluated, "eval/reward", "eval/response_length"),
    ):
        length = found[prefix]
        parts = {name.removeprefix(f"{total}/") for name in found if name.startswith(f"{total}/")}
        assert parts == NAMES
        assert found[f"{total}/row"] == pytest.approx(5.0, abs=1e-6)  # 2 · 2.5; logged in float32
        assert found[f"{total}/inner/lengths"] == pytest.approx(length, abs=1e-6)
        assert found[f"{total}/inner"] == pytest.approx(0.5 * length + 5.0, abs=1e-6)
        assert found[total] == pytest.approx(3 * 5.0 - (0.5 * length + 5.0), abs=1e-5)


def test_parts_are_before_the_shaping(module, make_trainer, as_loader, left_padded, recorder):
    built = module(nested(), shaping=(TruncatedScore(value=-100.0),))
    batch = left_padded(RAGGED, rows=NUMBERED)
    make_trainer(callbacks=[recorder]).fit(built, as_loader([{"prompts": batch}]))
    logged = recorder.steps[0]
    assert 0 < logged["objective/eos_rate"] < 1
    assert logged["objective/scores/row"] == pytest.approx(5.0, abs=1e-6)
    assert logged["objective/scores"] < -5


def test_fillers_do_not_count_in_the_parts(module, make_trainer, as_loader, left_padded):
    rows = [*NUMBERED[:4], {"prompt": "p", "number": 900}, {"prompt": "p", "number": 900}]
    batch = left_padded(RAGGED, rows=rows, counts=[True] * 4 + [False] * 2)
    (found,) = make_trainer().validate(module(nested()), as_loader([batch]), verbose=False)
    assert found["eval/reward/row"] == pytest.approx(3.0)  # 2 · (0 + 1 + 2 + 3) / 4
    (tested,) = make_trainer().test(module(nested()), as_loader([batch]), verbose=False)
    assert tested["test/reward/inner/twice"] == pytest.approx(3.0)


def test_predictions_hold_the_parts(module, make_trainer, as_loader, left_padded):
    (records,) = make_trainer().predict(module(nested()), as_loader([left_padded(RAGGED, rows=NUMBERED)]))
    for i, record in enumerate(records):
        assert {name.removeprefix("score/") for name in record if name.startswith("score/")} == NAMES
        assert record["score/row"] == 2.0 * i
        assert record["score"] == pytest.approx(6.0 * i - (0.5 * record["length"] + 2.0 * i))
        json.dumps(record)


def test_weighting_by_one_trains_as_the_part_alone(module, make_trainer, as_loader, left_padded, token_reward):
    """The weights reach the update: 1, and not 2."""

    def weights(reward):
        built = module(reward)
        make_trainer().fit(built, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
        return torch.cat([p.detach().flatten() for p in built.policy.parameters()])

    alone = weights(token_reward())
    assert torch.equal(alone, weights(WeightedReward({"a": token_reward()})))
    assert torch.equal(alone, weights(WeightedReward({"a": token_reward(), "b": Lengths()}, {"a": 1.0, "b": 0.0})))
    assert not torch.equal(alone, weights(WeightedReward({"a": token_reward()}, {"a": 2.0})))


# YAML


@pytest.fixture
def run(make_folder, write_rows, tmp_path, monkeypatch):
    """Runs a command on a config whose `reward` is given, with more arguments; the CLI object."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    (tmp_path / "theirs_of_composed.py").write_text(
        "def number(prompts, responses, answer):\n    return [float(a) for a in answer]\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = write_rows("rows.jsonl", [{"prompt": letter, "answer": str(i)} for i, letter in enumerate("abcd")])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    config: dict[str, Any] = {
        "trainer": quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path)},
        "model": {
            "class_path": "PPOModule",
            "init_args": {
                "policy": {"path": make_folder()},
                "generation": {"max_new_tokens": 3},
                "algorithm": {"shaping": []},
            },
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": rows, "val": rows, "batch_size": 4}},
    }

    def call(reward: Any = None, *more: str, command: str = "fit") -> Any:
        if reward is not None:
            config["model"]["init_args"]["reward"] = reward
        Path("run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return main([command, "--config", "run.yaml", *more])

    return call


def learned(path: str) -> dict[str, Any]:
    return {"class_path": "LearnedReward", "init_args": {"path": path}}


def test_weighted_reward_is_built_from_yaml(run, make_folder):
    parts = {"help": learned(make_folder(scorer=True)), "number": "theirs_of_composed.number"}
    arguments = {"parts": parts, "weights": {"help": 0.5, "number": 2.0}}
    cli = run({"class_path": "WeightedReward", "init_args": arguments})
    reward, logged = cli.model.reward, cli.trainer.callback_metrics
    assert {name: type(member) for name, member in reward.members.items()} == {
        "help": LearnedReward,
        "number": FunctionReward,
    }
    assert reward.weights == {"help": 0.5, "number": 2.0}
    for total in ("objective/scores", "eval/reward"):
        assert float(logged[f"{total}/number"]) == pytest.approx(1.5)  # (0 + 1 + 2 + 3) / 4
        by_hand = 0.5 * float(logged[f"{total}/help"]) + 2.0 * 1.5
        assert float(logged[total]) == pytest.approx(by_hand, abs=1e-5)


def test_weighted_reward_is_built_from_the_command_line(run):
    parts = json.dumps({"number": "theirs_of_composed.number", "again": "theirs_of_composed.number"})
    flags = ["--model.reward=WeightedReward", f"--model.reward.parts={parts}"]
    flags += ['--model.reward.weights={"number": 1.0, "again": 3.0}']
    cli = run(None, *flags, command="validate")
    assert float(cli.trainer.callback_metrics["eval/reward"]) == pytest.approx(4 * 1.5)


def test_ensemble_of_two_folders_is_built_from_yaml(run, make_folder):
    """Each member from its folder; worst case, and the mean where nothing is said."""
    folders = [make_folder(scorer=True, seed=seed) for seed in (1, 2)]
    worst = {
        "class_path": "EnsembleReward",
        "init_args": {"rewards": list(map(learned, folders)), "combine": "WorstReward"},
    }
    cli = run(worst, command="validate")
    reward, logged = cli.model.reward, cli.trainer.callback_metrics
    assert [member.path for member in reward.members.values()] == folders
    assert isinstance(reward.combine, WorstReward)
    members = [float(logged[f"eval/reward/member_{i}"]) for i in range(2)]
    assert members[0] != pytest.approx(members[1], abs=1e-3)
    assert float(logged["eval/reward"]) <= min(members) + 1e-6
    mean = run(
        {"class_path": "EnsembleReward", "init_args": {"rewards": list(map(learned, folders))}}, command="validate"
    )
    assert isinstance(mean.model.reward.combine, MeanReward)
    assert float(mean.trainer.callback_metrics["eval/reward"]) == pytest.approx(sum(members) / 2, abs=1e-5)


def test_nested_rewards_are_built_from_yaml(run, make_folder):
    folders = [make_folder(scorer=True, seed=seed) for seed in (1, 2)]
    combine = {"class_path": "UncertaintyWeighted", "init_args": {"coef": 0.25}}
    ensemble = {"rewards": list(map(learned, folders)), "combine": combine}
    parts = {"help": {"class_path": "EnsembleReward", "init_args": ensemble}, "number": "theirs_of_composed.number"}
    cli = run({"class_path": "WeightedReward", "init_args": {"parts": parts}}, command="validate")
    assert cli.model.reward.members["help"].combine == UncertaintyWeighted(coef=0.25)
    assert "eval/reward/help/spread" in cli.trainer.callback_metrics


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_wrong_weights_in_yaml_are_refused_with_the_sentence(run, command, capsys):
    arguments = {"parts": {"number": "theirs_of_composed.number"}, "weights": {"numbr": 1.0}}
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run({"class_path": "WeightedReward", "init_args": arguments}, command=command)
    said = capsys.readouterr().err + str(stopped.value)
    assert "`weights` must name the parts ['number']: got ['numbr']" in said
