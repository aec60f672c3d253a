"""Choices that are right alone and wrong together: each sentence, and the neighboring pair that passes in silence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gathered import PARTS, gathered

from lightning_rlhf.cli import main
from lightning_rlhf.core import (
    CISPO,
    GAE,
    K1,
    BanditAdvantage,
    BatchMean,
    Clip,
    ClippedValueLoss,
    GeometricLevel,
    GroupAdvantage,
    ImportanceSampling,
    KLInLoss,
    KLPen,
    LearnedValue,
    LeaveOneOut,
    LengthPenalty,
    MaskedIS,
    NoScale,
    RewardToGo,
    RunningMean,
    SequenceLevel,
    SoftOverlong,
    TokenLevel,
    TruncatedIS,
    TruncatedScore,
    Whitened,
    local,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule

ONE, K2 = SamplingParams(samples_per_prompt=1), SamplingParams(samples_per_prompt=2)
GSPO = Clip(epsilon=3e-4, epsilon_high=4e-4)
ONE_EACH = (
    " compares the responses to one prompt, but each prompt gets one: set `generation.samples_per_prompt` to at least 2"
)
NO_NETWORK = ": leave them out, or take an advantage such as GAE or BanditAdvantage(baseline=LearnedValue())"
NO_KL = (
    "KLPen needs the ratio π_θ/π_old, but GeometricLevel normalizes it by the length, so that its k3 is no KL: "
    "take SequenceLevel or TokenLevel, or Clip(epsilon=3e-4, epsilon_high=4e-4)"
)


def make(**options: Any) -> PPOModule:
    """Nothing is built before the choices are judged, so the policy may be anything."""
    return PPOModule(torch.nn.Linear(1, 1), lambda prompts, responses: [0.0] * len(prompts), **gathered(**options))


def silent(**options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(**options)


# A value network that is not there


OF_VALUE = {
    "value": ModelSource(path="nowhere"),
    "value_lr": 1e-5,
    "value_loss": ClippedValueLoss(),
}
WITHOUT = {
    "BanditAdvantage": (BanditAdvantage(), {}),
    "GroupAdvantage": (GroupAdvantage(), {"generation": K2}),
    "RewardToGo": (RewardToGo(), {}),
    "Whitened": (Whitened(estimator=RewardToGo()), {}),
}


@pytest.mark.parametrize("argument", OF_VALUE)
@pytest.mark.parametrize("name", WITHOUT)
def test_value_settings_without_a_value_network_are_refused(name, argument):
    advantage, options = WITHOUT[name]
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make(advantage=advantage, **{argument: OF_VALUE[argument]}, **options)
    verb, them = ("belongs", "it") if argument == "value_loss" else ("belong", "them")
    without = NO_NETWORK.replace("them", them)
    assert str(refused.value) == f"`{argument}` {verb} to a value network, but {name} trains none{without}"
    silent(advantage=advantage, **options)


def test_all_value_settings_are_named():
    with pytest.raises(ValueError, match="^`value`, `value_lr` belong to a value network"):
        make(value=OF_VALUE["value"], value_lr=1e-5)


@pytest.mark.parametrize(
    "advantage",
    [
        GAE(),
        Whitened(),
        BanditAdvantage(baseline=LearnedValue()),
        Whitened(estimator=BanditAdvantage(baseline=LearnedValue())),
    ],
    ids=["gae", "whitened", "critic", "whitened-critic"],
)
def test_value_settings_with_a_value_network_pass(advantage):
    silent(advantage=advantage, level=TokenLevel(), **OF_VALUE)


# Groups of one


@pytest.mark.parametrize(
    ("advantage", "named"),
    [
        (GroupAdvantage(), "GroupAdvantage"),
        (GroupAdvantage(scale=NoScale()), "GroupAdvantage"),
        (BanditAdvantage(baseline=LeaveOneOut()), "LeaveOneOut"),
    ],
    ids=["grpo", "dr-grpo", "rloo"],
)
def test_groups_of_one_are_refused(advantage, named):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make(advantage=advantage, generation=ONE)
    assert str(refused.value) == named + ONE_EACH
    silent(advantage=advantage, generation=K2)
    assert make(advantage=advantage).samples_per_prompt == 8


@pytest.mark.parametrize("inner", [GroupAdvantage(), BanditAdvantage(baseline=LeaveOneOut())], ids=["grpo", "rloo"])
def test_groups_of_one_are_refused_inside_a_whitening(inner):
    with pytest.raises(ValueError, match="set `generation.samples_per_prompt` to at least 2"):
        make(advantage=Whitened(estimator=inner), generation=ONE)
    silent(advantage=Whitened(estimator=inner), generation=K2)


@pytest.mark.parametrize(
    ("inner", "named"),
    [(GroupAdvantage(), "GroupAdvantage"), (BanditAdvantage(baseline=LeaveOneOut()), "LeaveOneOut")],
    ids=["grpo", "rloo"],
)
def test_what_compares_is_named_inside_a_whitening(inner, named):
    with pytest.raises(ValueError, match=f"^{named} compares the responses"):
        make(advantage=Whitened(estimator=inner), generation=ONE)


@pytest.mark.parametrize(
    "advantage",
    [BanditAdvantage(), BanditAdvantage(baseline=BatchMean()), BanditAdvantage(baseline=RunningMean()), RewardToGo()],
    ids=["none", "batch", "running", "to-go"],
)
def test_what_compares_nothing_takes_one_or_many(advantage):
    assert make(advantage=advantage).samples_per_prompt == 1
    silent(advantage=advantage, generation=ONE)
    silent(advantage=advantage, generation=K2)


# The length-normalized ratio


@pytest.mark.parametrize("penalty", [KLPen(), KLPen(coef=2.0, target=None)], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: TruncatedIS(surrogate=s)], ids=["bare", "weighted"])
def test_penalty_on_a_length_normalized_ratio_is_refused(penalty, wrap):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        make(level=GeometricLevel(), surrogate=wrap(penalty))
    assert str(refused.value) == NO_KL
    for level in (SequenceLevel(), TokenLevel()):
        silent(level=level, surrogate=wrap(penalty))
    silent(level=GeometricLevel(), surrogate=GSPO)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({}, "Clip(epsilon=0.2, epsilon_high=None)"),  # PPO's 0.2, the default
        ({"epsilon": 0.2, "epsilon_high": 0.28}, "Clip(epsilon=0.2, epsilon_high=0.28)"),
        ({"epsilon": 3e-4, "epsilon_high": 0.2}, "Clip(epsilon=0.0003, epsilon_high=0.2)"),
        ({"epsilon": 0.2, "epsilon_high": 4e-4}, "Clip(epsilon=0.2, epsilon_high=0.0004)"),
    ],
)
def test_wide_bounds_on_a_length_normalized_ratio_are_warned_of(bounds, said):
    sentence = f"{said} never acts on GeometricLevel's length-normalized ratio: GSPO's bounds are epsilon=3e-4, "
    for wrap in (lambda s: s, lambda s: MaskedIS(surrogate=TruncatedIS(surrogate=s))):
        with pytest.warns(UserWarning, match="never acts") as found:
            make(level=GeometricLevel(), surrogate=wrap(Clip(**bounds)))
        assert [str(w.message) for w in found] == [sentence + "epsilon_high=4e-4"]
        assert found[0].filename == __file__  # it points at who chose
        silent(level=SequenceLevel(), surrogate=wrap(Clip(**bounds)))
        silent(level=TokenLevel(), surrogate=wrap(Clip(**bounds)))


@pytest.mark.parametrize("surrogate", [GSPO, Clip(epsilon=0.05), Clip(epsilon=1e-3), ImportanceSampling()])
def test_fitting_bounds_on_a_length_normalized_ratio_pass(surrogate):
    silent(level=GeometricLevel(), surrogate=surrogate)


@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel(), GeometricLevel()], ids=["sequence", "token", "gspo"])
def test_small_bounds_pass_everywhere(level):
    silent(level=level, surrogate=GSPO)


@pytest.mark.parametrize(
    ("surrogate", "said", "near"),
    [
        (CISPO(), "CISPO(largest=5.0)", CISPO(largest=1.0004)),
        (
            Clip(epsilon=3e-4, epsilon_high=4e-4, dual=3.0),
            "Clip(dual=3.0)",
            Clip(epsilon=3e-4, epsilon_high=4e-4, dual=1.01),
        ),
    ],
    ids=["cispo", "dual"],
)
def test_other_bounds_that_never_act_are_warned_of(surrogate, said, near):
    with pytest.warns(UserWarning, match="GeometricLevel") as found:
        make(level=GeometricLevel(), surrogate=surrogate)
    assert [str(w.message).split(" never acts")[0] for w in found] == [said]
    silent(level=GeometricLevel(), surrogate=near)
    silent(level=TokenLevel(), surrogate=surrogate)


# Lengths that no response reaches


@pytest.mark.parametrize(("limit", "buffer"), [(200, 50), (256, 128), (129, 1)])
def test_overlong_penalty_beyond_the_longest_response_is_warned_of(limit, buffer):
    rule = SoftOverlong(limit=limit, buffer=buffer)
    with pytest.warns(UserWarning, match="never acts") as found:
        make(shaping=[TruncatedScore(), rule], generation=SamplingParams(max_new_tokens=128))
    assert [str(w.message) for w in found] == [
        f"SoftOverlong(limit={limit}, buffer={buffer}) never acts: responses end at `generation.max_new_tokens`=128; "
        "set `limit` to that"
    ]
    assert found[0].filename == __file__
    silent(shaping=[rule], generation=SamplingParams(max_new_tokens=limit))


@pytest.mark.parametrize(("limit", "buffer"), [(128, 32), (128, 128), (200, 73), (64, 16)])
def test_overlong_penalty_that_is_reached_passes(limit, buffer):
    """Of 200 and 73 the 128th token is the first that costs."""
    silent(shaping=[SoftOverlong(limit=limit, buffer=buffer)], generation=SamplingParams(max_new_tokens=128))


def test_overlong_boundary_is_where_the_penalty_begins():
    """What is warned of is 0 for the longest response, its neighbor is not."""
    longest = {"lengths": torch.tensor([128]), "ended": torch.tensor([True])}
    scores = torch.zeros(1, dtype=torch.float64)
    assert float(SoftOverlong(limit=200, buffer=72)(scores, **longest)) == 0.0
    assert float(SoftOverlong(limit=200, buffer=73)(scores, **longest)) == pytest.approx(-1 / 73, abs=1e-12)
    with pytest.warns(UserWarning, match="never acts"):
        make(shaping=[SoftOverlong(limit=200, buffer=72)], generation=SamplingParams(max_new_tokens=128))


def test_other_rules_pass():
    silent(shaping=[TruncatedScore(), LengthPenalty(coef=0.1)])
    silent(shaping=[])


@pytest.mark.parametrize("order", [["overlong", "replace"], ["replace", "overlong"]], ids="-".join)
def test_later_rules_may_undo_earlier_ones(order):
    """Rules are applied in turn: a score that is replaced has lost its penalty."""
    rules = {"overlong": SoftOverlong(limit=128, buffer=32), "replace": TruncatedScore(value=-1.0)}
    score = torch.tensor([0.5], dtype=torch.float64)
    for name in order:
        score = rules[name](score, lengths=torch.tensor([128]), ended=torch.tensor([False]))
    assert float(score) == (-1.0 if order[0] == "overlong" else -2.0)


# Refused where the object itself is made


def test_k1_in_the_loss_is_refused():
    with pytest.raises(ValueError, match=r"^`estimator`=K1 does nothing in the loss: its gradient is 0 in expectation"):
        KLInLoss(estimator=K1())
    silent(kl_term=KLInLoss())


def test_penalty_of_zero_cannot_adapt():
    with pytest.raises(ValueError, match="doubling 0 gives 0"):
        KLPen(coef=0.0)
    silent(surrogate=KLPen(coef=0.0, target=None))


# Pairs of which one does nothing


def advantages(estimator, *, level=None):
    """Of two prompts with three responses of 1, 2 or 3 tokens."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]] * 2).bool()
    rewards = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).where(mask, 0.0)
    if level is not None:  # one action per response
        mask, rewards = mask[:, :1], rewards.sum(1, keepdim=True)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    return estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=local).advantages


@pytest.mark.parametrize("level", [None, SequenceLevel()], ids=["token", "sequence"])
@pytest.mark.parametrize("baseline", [BatchMean(), RunningMean(mean=3.0, weight=0.5)], ids=["batch", "running"])
def test_whitening_undoes_a_baseline_that_is_one_number(baseline, level):
    """A constant goes with the mean. What differs by prompt or response stays."""
    bare = advantages(Whitened(estimator=BanditAdvantage()), level=level)
    shifted = advantages(Whitened(estimator=BanditAdvantage(baseline=baseline)), level=level)
    assert torch.allclose(bare, shifted, rtol=0, atol=1e-12)
    by_group = advantages(Whitened(estimator=BanditAdvantage(baseline=LeaveOneOut())), level=level)
    assert not torch.allclose(bare, by_group, atol=1e-2)


@pytest.mark.parametrize("other", [GAE(lam=0.3), GAE(gamma=0.5)], ids=["lambda", "gamma"])
def test_single_actions_know_neither_discount_nor_lambda(other):
    """At sequence level the episode is one action long."""
    assert torch.equal(advantages(GAE(), level=SequenceLevel()), advantages(other, level=SequenceLevel()))
    assert not torch.equal(advantages(GAE()), advantages(other))


# Through the command line


@pytest.fixture
def run(make_folder, write_rows, tmp_path, monkeypatch):
    """Trains one rollout of a config with these arguments of the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    (tmp_path / "theirs_of_combinations.py").write_text(
        "def number(prompts, responses):\n    return [float(len(r)) for r in responses]\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = write_rows("rows.jsonl", [{"prompt": letter} for letter in "abcd"])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path)}
    data = {"class_path": "PromptDataModule", "init_args": {"train": rows, "batch_size": 4}}

    def call(**arguments: Any) -> Any:
        usual = {"policy": {"path": make_folder()}, "reward": "theirs_of_combinations.number"}
        usual |= {"generation": {"max_new_tokens": 3, "samples_per_prompt": 2}, "shaping": []}
        given = usual | arguments
        parts = {name: given.pop(name) for name in PARTS if name in given}
        model = {"class_path": "PPOModule", "init_args": given | {"algorithm": parts}}
        Path("run.yaml").write_text(
            yaml.safe_dump({"trainer": trainer, "model": model, "data": data}), encoding="utf-8"
        )
        return main(["fit", "--config", "run.yaml"])

    return call


REFUSED = {
    "one-each": (
        {"advantage": "GroupAdvantage", "generation": {"max_new_tokens": 3, "samples_per_prompt": 1}},
        f"GroupAdvantage{ONE_EACH}",
    ),
    "no-value": ({"value_lr": 1.0e-5}, "`value_lr` belong to a value network, but BanditAdvantage trains none"),
    "no-kl": ({"level": "GeometricLevel", "surrogate": "KLPen"}, NO_KL),
    "k1": (
        {"kl_term": {"class_path": "KLInLoss", "init_args": {"estimator": "K1"}}},
        "`estimator`=K1 does nothing in the loss",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_reaches_the_command_line(run, capsys, name):
    arguments, sentence = REFUSED[name]
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run(**arguments)
    assert sentence in capsys.readouterr().err + str(stopped.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"level": "GeometricLevel"}, "never acts on GeometricLevel"),
        (
            {"shaping": [{"class_path": "SoftOverlong", "init_args": {"limit": 100, "buffer": 10}}]},
            "SoftOverlong.*never acts",
        ),
    ],
    ids=["bounds", "lengths"],
)
def test_warning_reaches_the_command_line(run, arguments, sentence):
    with pytest.warns(UserWarning, match=sentence):
        run(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"advantage": "GroupAdvantage", "kl_term": {"class_path": "KLInLoss", "init_args": {"estimator": "K3"}}},
        {
            "level": "GeometricLevel",
            "surrogate": {"class_path": "Clip", "init_args": {"epsilon": 3.0e-4, "epsilon_high": 4.0e-4}},
            "shaping": [{"class_path": "SoftOverlong", "init_args": {"limit": 3, "buffer": 1}}],
        },
    ],
    ids=["grpo", "gspo"],
)
def test_neighboring_pairs_train_in_silence(run, arguments, recwarn):
    cli = run(**arguments)
    assert cli.model.iteration == 1
    assert not [w for w in recwarn if "never acts" in str(w.message)]
