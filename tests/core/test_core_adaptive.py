"""What moves, and how it survives a checkpoint: every class of the core that can adapt."""

import json
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from inspect import isabstract

import pytest

from lightning_rlhf.core import (
    CISPO,
    DAPO,
    GAE,
    GDPO,
    GRPO,
    GSPO,
    LUSPO,
    RLOO,
    SAPO,
    TLDR,
    VESPO,
    Adaptive,
    AdaptiveEntropy,
    AdaptiveKL,
    Algorithm,
    BanditAdvantage,
    BatchMean,
    CISPOMethod,
    Clip,
    ClipScore,
    DrGRPO,
    EntropyBonus,
    FixedKL,
    GroupAdvantage,
    ImportanceSampling,
    InstructGPT,
    KLPen,
    LearnedValue,
    LeaveOneOut,
    LengthNormalized,
    LengthPenalty,
    MaskedIS,
    MaxRL,
    MissingEOSPenalty,
    NoBaseline,
    NoCorrection,
    OnPolicyDistillation,
    PerReward,
    ReinforcePP,
    RewardToGo,
    RunningMean,
    RunningNormalized,
    SAPOMethod,
    SoftOverlong,
    TruncatedIS,
    TruncatedScore,
    VESPOMethod,
    Whitened,
)

RUNNING = RunningMean(decay=0.5)
NESTED = Whitened(estimator=BanditAdvantage(baseline=RUNNING))

# a setting, one step of adapting it, and the numbers that a checkpoint must hold after it


def rolled_out(algorithm: Algorithm) -> Algorithm:
    """After a rollout of 50 responses with a KL of 60 nats, a reward of 4 and a KL to π_old of 1."""
    means = {"objective/kl": 60.0, "objective/rlhf_reward": 4.0, "policy/kl_old": 1.0, "policy/entropy_avg": 0.5}
    return algorithm.adapted(means | {"objective/raw_scores": 3.0, "objective/raw_scores_square": 13.0}, 50)


MOVING = {
    "algorithm": (
        Algorithm(
            beta=AdaptiveKL(coef=0.1, horizon=100.0),
            advantage=BanditAdvantage(baseline=RUNNING),
            surrogate=KLPen(coef=2.0),
            entropy_bonus=AdaptiveEntropy(coef=0.25, target=1.0, step=0.125),
            shaping=[RunningNormalized(mean=1.0, squares=8.0, count=50.0), MissingEOSPenalty()],
        ),
        rolled_out,
        {
            "beta.coef": 0.1 * (1 + 0.2 * 50 / 100),
            "advantage.baseline.mean": 2.0,
            "advantage.baseline.weight": 0.5,
            "surrogate.coef": 4.0,
            "shaping.0.mean": 2.0,
            "shaping.0.squares": 8.0 + 4.0 * 50 + 4.0 * 50 * 50 / 100,
            "shaping.0.count": 100.0,
            "entropy_bonus.coef": 0.375,
            "entropy_bonus.entropy": 0.5,
        },
    ),
    "adaptive_entropy": (
        AdaptiveEntropy(coef=0.25, target=1.0, step=0.125),
        lambda x: x.adapted(2.0),
        {"coef": 0.125, "entropy": 2.0},
    ),
    "adaptive_kl": (AdaptiveKL(coef=0.5, horizon=10.0), lambda x: x.adapted(60.0, 5), {"coef": 0.55}),  # 0.5·(1 + 0.1)
    "kl_penalty": (KLPen(coef=2.0), lambda x: x.adapted(1.0), {"coef": 4.0}),
    "running_normalized": (
        RunningNormalized(),
        lambda x: x.adapted(3.0, 4.0, 50),
        {"mean": 3.0, "squares": 200.0, "count": 50.0},
    ),
    "running_mean": (RUNNING, lambda x: x.adapted(4.0), {"mean": 2.0, "weight": 0.5}),
    "bandit": (
        BanditAdvantage(baseline=RUNNING),
        lambda x: x.adapted(4.0),
        {"baseline.mean": 2.0, "baseline.weight": 0.5},
    ),
    "whitened": (
        NESTED,
        lambda x: x.adapted(4.0),
        {"estimator.baseline.mean": 2.0, "estimator.baseline.weight": 0.5},
    ),
    "truncated": (TruncatedIS(surrogate=KLPen(coef=2.0)), lambda x: x.adapted(1.0), {"surrogate.coef": 4.0}),
    "masked": (
        MaskedIS(surrogate=TruncatedIS(surrogate=KLPen(coef=2.0))),
        lambda x: x.adapted(1.0),
        {"surrogate.surrogate.coef": 4.0},
    ),
}

METHODS = (Algorithm, InstructGPT, TLDR, RLOO, ReinforcePP, GRPO, DrGRPO, DAPO, GSPO, CISPOMethod)
METHODS += (LUSPO, SAPOMethod, VESPOMethod, OnPolicyDistillation, MaxRL, GDPO)
STILL = {
    "entropy_bonus": (EntropyBonus(), lambda x: x.adapted(2.0)),
    "fixed_kl": (FixedKL(coef=0.05), lambda x: x.adapted(60.0, 5)),
    "clip": (Clip(), lambda x: x.adapted(1.0)),
    "cispo": (CISPO(), lambda x: x.adapted(1.0)),
    "sapo": (SAPO(), lambda x: x.adapted(1.0)),
    "vespo": (VESPO(), lambda x: x.adapted(1.0)),
    "unclipped": (ImportanceSampling(), lambda x: x.adapted(1.0)),
    "fixed_penalty": (KLPen(coef=2.0, target=None), lambda x: x.adapted(1.0)),
    "truncated": (TruncatedIS(), lambda x: x.adapted(1.0)),
    "masked": (MaskedIS(), lambda x: x.adapted(1.0)),
    "no_correction": (NoCorrection(), lambda x: x.adapted(1.0)),
    "gae": (GAE(), lambda x: x.adapted(4.0)),
    "reward_to_go": (RewardToGo(), lambda x: x.adapted(4.0)),
    "group": (GroupAdvantage(), lambda x: x.adapted(4.0)),
    "bandit": (BanditAdvantage(), lambda x: x.adapted(4.0)),
    "whitened": (Whitened(), lambda x: x.adapted(4.0)),
    **{
        type(rule).__name__: (rule, lambda x: x.adapted(1.0, 2.0, 3))
        for rule in (
            ClipScore(),
            LengthNormalized(),
            LengthPenalty(coef=0.1),
            MissingEOSPenalty(),
            SoftOverlong(),
            TruncatedScore(),
        )
    },
    "per_reward": (PerReward(), lambda x: x.adapted(4.0)),
    "no_baseline": (NoBaseline(), lambda x: x.adapted(4.0)),
    "batch_mean": (BatchMean(), lambda x: x.adapted(4.0)),
    "leave_one_out": (LeaveOneOut(), lambda x: x.adapted(4.0)),
    "learned_value": (LearnedValue(), lambda x: x.adapted(4.0)),
    **{method.__name__: (method(), rolled_out) for method in METHODS},
}


def concrete(cls):
    below = {c for sub in cls.__subclasses__() for c in concrete(sub)}
    own = set() if isabstract(cls) or not cls.__module__.startswith("lightning_rlhf.core") else {cls}
    return own | below


def test_every_class_that_adapts_is_tested_here():
    tested = {type(setting) for setting, *_ in [*MOVING.values(), *STILL.values()]}
    missing = {c.__name__ for c in concrete(Adaptive) - tested} - {"Adaptive", "MismatchIS"}
    assert not missing
    # what moves is among the classes that say so
    assert {type(s) for s, *_ in MOVING.values()} >= {c for c in concrete(Adaptive) if "moving" in vars(c)} - {Adaptive}


@pytest.mark.parametrize("name", MOVING)
def test_state_round_trip(name):
    fresh, step, expected = MOVING[name]
    moved = step(fresh)
    state = moved.state()
    assert state.keys() == expected.keys()
    assert all(abs(state[key] - expected[key]) <= 1e-12 for key in expected)
    assert all(type(number) is float for number in state.values())
    # through JSON, as a checkpoint of plain numbers may be; and not the identity by accident
    assert fresh.restored(json.loads(json.dumps(state))) == moved
    assert fresh != moved
    assert fresh.restored(fresh.state()) == fresh


@pytest.mark.parametrize("name", MOVING)
def test_resumed_and_uninterrupted_take_the_same_next_step(name):
    fresh, step, _ = MOVING[name]
    assert step(fresh.restored(step(fresh).state())) == step(step(fresh))
    assert step(step(fresh)) != step(fresh)


@pytest.mark.parametrize("name", MOVING)
def test_adapting_returns_a_successor_and_does_not_change_the_setting(name):
    fresh, step, _ = MOVING[name]
    before = fresh.state()
    moved = step(fresh)
    assert type(moved) is type(fresh)
    assert moved is not fresh
    assert fresh.state() == before
    with pytest.raises(FrozenInstanceError):
        setattr(fresh, fields(fresh)[0].name, 1.0)
    moved.state()["coef"] = 7.0  # a copy: the setting does not follow
    assert moved == step(fresh)


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_adapt_is_its_own_successor(name):
    setting, step = STILL[name]
    assert step(setting) == setting
    assert setting.state() == {}
    assert setting.restored({}) == setting
    with pytest.raises(ValueError, match=r"the checkpoint holds \['coef'\] for .*, which needs \[\]"):
        setting.restored({"coef": 1.0})


@pytest.mark.parametrize("name", MOVING)
def test_a_state_of_other_numbers_is_refused(name):
    fresh, _, expected = MOVING[name]
    wrong = [
        {},
        dict(list(expected.items())[1:]),
        expected | {"extra": 1.0},
        {f"baseline.{key}": number for key, number in expected.items()},
        {key.rpartition(".")[2] + "x": number for key, number in expected.items()},
    ]
    for state in wrong:
        with pytest.raises(ValueError, match="the checkpoint holds .* resume with the class that wrote it"):
            fresh.restored(state)


def test_a_refusal_names_what_came_and_what_is_needed():
    message = r"the checkpoint holds \['mean', 'weight'\] for Whitened, which needs \['estimator.baseline.mean', "
    with pytest.raises(ValueError, match=message):
        NESTED.restored({"mean": 1.0, "weight": 0.5})


@pytest.mark.parametrize(
    ("setting", "state"),
    [
        (AdaptiveKL(), {"coef": float("nan")}),
        (AdaptiveKL(), {"coef": 0.0}),
        (KLPen(), {"coef": -1.0}),
        (RUNNING, {"mean": 1.0, "weight": 2.0}),
        (NESTED, {"estimator.baseline.mean": 1.0, "estimator.baseline.weight": 0.0}),
    ],
    ids=repr,
)
def test_a_state_is_checked_as_a_constructor_argument_is(setting, state):
    with pytest.raises(ValueError, match="`(coef|weight|mean)`"):
        setting.restored(state)


def test_restored_keeps_the_settings_of_the_run_that_resumes():
    # numbers that move come from the checkpoint, the others from the configuration
    wrote = Whitened(estimator=BanditAdvantage(baseline=RunningMean(decay=0.9, mean=1.0, weight=0.5)))
    resumed = NESTED.restored(wrote.state())
    assert resumed.estimator.baseline == RunningMean(decay=0.5, mean=1.0, weight=0.5)
    penalty = TruncatedIS(surrogate=KLPen(target=0.3), cap=7.0).restored({"surrogate.coef": 9.0})
    assert penalty == TruncatedIS(surrogate=KLPen(coef=9.0, target=0.3), cap=7.0)


def test_states_of_two_inner_settings_stay_apart():
    @dataclass(frozen=True, kw_only=True)
    class Two(Adaptive):
        kl: AdaptiveKL
        kl_2: AdaptiveKL  # one name is the beginning of the other
        own: float = 3.0

        def moving(self):
            return ("own",)

    two = Two(kl=AdaptiveKL(coef=1.0), kl_2=AdaptiveKL(coef=2.0))
    assert two.state() == {"own": 3.0, "kl.coef": 1.0, "kl_2.coef": 2.0}
    state = {"kl_2.coef": 5.0, "own": 6.0, "kl.coef": 4.0}
    assert two.restored(state) == replace(two, own=6.0, kl=AdaptiveKL(coef=4.0), kl_2=AdaptiveKL(coef=5.0))
