import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    CISPO,
    SAPO,
    VESPO,
    Clip,
    ImportanceSampling,
    KLPen,
    MaskedIS,
    NoCorrection,
    Surrogate,
    TokenLevel,
    TruncatedIS,
    importance_ratio,
)

TIGHT = {"rtol": 0, "atol": 1e-9}
SURROGATES = [
    ImportanceSampling(),
    Clip(),
    Clip(epsilon=0.2, epsilon_high=0.28, dual=3.0),
    CISPO(),
    CISPO(largest=1.5, smallest=0.5),
    KLPen(),
    SAPO(),
    SAPO(temperature_positive=0.3, temperature_negative=4.0),
    VESPO(),
    TruncatedIS(),
    MaskedIS(),
    NoCorrection(),
]


def loss_and_gradient(surrogate, ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), log_ratio)
    return out.loss.item(), gradient.item(), {name: stat.item() for name, stat in out.stats.items()}


def test_importance_ratio_is_the_exponential_and_is_held_at_forty_nats(float64):
    got = importance_ratio(float64([-800.0, math.log(0.5), 0.0, math.log(3), 40.0, 40.1, 1e4]))
    assert_close(got[:4], float64([0.0, 0.5, 1.0, 3.0]), **TIGHT)
    # 1e-14 relative: e⁴⁰ is written here with 15 digits
    assert_close(got[4:], float64([2.35385266837020e17] * 3), rtol=1e-14, atol=0)
    # negative control: it is not held below; and in float32 e⁸⁹ would be inf, as would (e⁴⁵)²
    assert 0 < float(importance_ratio(float64(-45.0))) < 1e-19
    assert importance_ratio(torch.tensor([1e4])).square().isfinite().all()


@given(st.floats(-5, 5), st.floats(-10, 10))
@settings(deadline=None, max_examples=30)
def test_unclipped_is_minus_ratio_times_advantage_and_so_is_its_gradient(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    loss, gradient, stats = loss_and_gradient(ImportanceSampling(), ratio, advantage)
    # 1e-12 relative: |ρA| reaches 1500 and log(exp(x)) is x only up to its rounding
    assert math.isclose(loss, -ratio * advantage, rel_tol=1e-12, abs_tol=1e-9)
    assert math.isclose(gradient, -ratio * advantage, rel_tol=1e-12, abs_tol=1e-9)
    assert stats == {}


def test_unclipped_is_bounded_by_nothing_where_clip_is():
    assert abs(loss_and_gradient(ImportanceSampling(), 50.0, 2.0)[0] + 100.0) <= 1e-9
    assert abs(loss_and_gradient(ImportanceSampling(), 50.0, 2.0)[1] + 100.0) <= 1e-9
    # negative control: Clip stops at 1.2·2
    assert abs(loss_and_gradient(Clip(), 50.0, 2.0)[0] + 2.4) <= 1e-9


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_every_surrogate_has_the_reinforce_gradient_at_ratio_one(surrogate):
    # d(−ρÂ)/d log ρ at ρ = 1 is −Â: no half gradient where two branches tie, no penalty
    for advantage in (2.0, -2.0, 0.5, 0.0):
        assert abs(loss_and_gradient(surrogate, 1.0, advantage)[1] + advantage) <= 1e-9


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_every_surrogate_treats_each_action_alone(float64, surrogate):
    # the loss of one action moves with no other: rows, order and shape change nothing
    x, a = float64([[0.3, -0.8, 1.1], [0.0, 0.05, -0.05]]), float64([[1.0, -2.0, -0.5], [3.0, -1.0, 0.0]])
    whole = surrogate(x, a)
    for i in range(2):
        for t in range(3):
            alone = surrogate(x[i : i + 1, t : t + 1], a[i : i + 1, t : t + 1])
            assert torch.equal(alone.loss, whole.loss[i : i + 1, t : t + 1])
            for name, stat in whole.stats.items():
                assert torch.equal(alone.stats[name], stat[i : i + 1, t : t + 1])


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_every_surrogate_stays_finite_at_extreme_log_ratios(surrogate):
    # float32, where e⁸⁹ is inf: a masked or stale token must not end a run
    x = torch.tensor([[-1e4, -90.0, 90.0, 1e4]], requires_grad=True)
    for advantage in (1.0, -1.0):
        out = surrogate(x, torch.full_like(x, advantage))
        assert out.loss.isfinite().all()
        assert torch.autograd.grad(out.loss.sum(), x)[0].isfinite().all()
        assert all(stat.isfinite().all() for stat in out.stats.values())


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_statistics_carry_no_gradient_and_the_shape_of_the_loss(float64, surrogate):
    out = surrogate(float64([[0.1, -0.5, 0.4]], requires_grad=True), float64([[1.0, -1.0, 2.0]]))
    assert out.loss.shape == (1, 3)
    assert out.loss.requires_grad
    for stat in out.stats.values():
        assert stat.shape == (1, 3)
        assert not stat.requires_grad


@pytest.mark.parametrize("surrogate", SURROGATES[:9], ids=repr)
def test_ordinary_surrogates_weigh_every_action_with_one(float64, surrogate):
    old = float64([[-3.0, 0.0, 50.0], [0.1, -0.1, 1.0]])
    weights = surrogate.weights(old, torch.zeros_like(old), torch.ones(2, 3, dtype=torch.bool), TokenLevel())
    assert torch.equal(weights.applied, torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(weights.changed, torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(weights.ratio, torch.where(old > 40, 40.0, old).exp())


@pytest.mark.parametrize("surrogate", [ImportanceSampling(), Clip(epsilon=0.1), CISPO()], ids=repr)
def test_surrogates_without_a_target_do_not_adapt(surrogate):
    assert surrogate.adapted(100.0) is surrogate
    assert surrogate.adapted(0.0) is surrogate
    assert not surrogate.adaptive
    assert surrogate.state() == {}
    assert surrogate.restored({}) == surrogate


def test_surrogates_refuse_the_state_of_another_class():
    with pytest.raises(ValueError, match=r"the checkpoint holds \['coef'\] for Clip, which needs \[\]"):
        Clip().restored(KLPen().state())
    with pytest.raises(ValueError, match=r"the checkpoint holds \[\] for KLPen, which needs \['coef'\]"):
        KLPen().restored(Clip().state())
    with pytest.raises(ValueError, match=r"the checkpoint holds \['coef'\] for TruncatedIS, which needs \[\]"):
        TruncatedIS().restored(KLPen().state())


def test_surrogate_defaults_are_the_published_ones():
    # ε = 0.2 (PPO, Ouyang et al. 2022 C.4), no DAPO and no dual bound; b starts at 1 with a target of 0.01 nats per
    # action; CISPO's cap is TRL's and it has no floor; TIS caps at 2; SAPO's and VESPO's are the papers'
    assert Clip() == Clip(epsilon=0.2, epsilon_high=None, dual=None)
    assert KLPen() == KLPen(coef=1.0, target=0.01)
    assert CISPO() == CISPO(largest=5.0, smallest=0.0)
    assert SAPO() == SAPO(temperature_positive=1.0, temperature_negative=1.05)
    assert VESPO() == VESPO(k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0)
    assert TruncatedIS() == TruncatedIS(cap=2.0, surrogate=Clip())
    assert MaskedIS() == MaskedIS(smallest=0.5, largest=2.0, surrogate=Clip())


def test_surrogates_are_frozen():
    for surrogate, name in (
        (Clip(), "epsilon"),
        (KLPen(), "coef"),
        (CISPO(), "largest"),
        (SAPO(), "temperature_positive"),
        (VESPO(), "k_positive"),
        (TruncatedIS(), "cap"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(surrogate, name, 2.0)


def test_surrogate_is_abstract():
    with pytest.raises(TypeError):
        Surrogate()
