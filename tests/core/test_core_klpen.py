import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import KLPen

TIGHT = {"rtol": 0, "atol": 1e-9}


def loss_and_gradient(surrogate, ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), log_ratio)
    return out.loss.item(), gradient.item(), {name: stat.item() for name, stat in out.stats.items()}


def test_kl_penalty_equals_hand_values():
    # ρ = 1.5, A = 2, b = 3: −ρA + b(ρ − 1 − log ρ) = −3 + 3(0.5 − log 1.5); d/d log ρ = −ρA + b(ρ − 1) = −3 + 1.5
    surrogate = KLPen(coef=3.0, target=None)
    loss, gradient, stats = loss_and_gradient(surrogate, 1.5, 2.0)
    penalty = 3 * (0.5 - math.log(1.5))
    assert abs(loss - (-3 + penalty)) <= 1e-9
    assert abs(gradient - (-1.5)) <= 1e-9
    assert list(stats) == ["policy/kl_penalty"]
    assert abs(stats["policy/kl_penalty"] - penalty) <= 1e-9
    # ρ = 0.5, A = −1, b = 3: 0.5 + 3(−0.5 + log 2); gradient 0.5 + 3(−0.5) = −1
    loss, gradient, _ = loss_and_gradient(surrogate, 0.5, -1.0)
    assert abs(loss - (0.5 + 3 * (math.log(2) - 0.5))) <= 1e-9
    assert abs(gradient - (-1.0)) <= 1e-9


@given(st.floats(-3, 3), st.floats(-10, 10), st.floats(0, 20), st.sampled_from([None, 0.01]))
@settings(deadline=None, max_examples=30)
def test_kl_penalty_equals_a_naive_scalar(log_ratio, advantage, coef, target):
    ratio = math.exp(log_ratio)
    got = loss_and_gradient(KLPen(coef=coef, target=target if coef > 0 else None), ratio, advantage)
    penalty = coef * (ratio - 1 - log_ratio)
    # 1e-12 relative: numbers reach 600
    assert math.isclose(got[0], penalty - ratio * advantage, rel_tol=1e-12, abs_tol=1e-9)
    assert math.isclose(got[1], coef * (ratio - 1) - ratio * advantage, rel_tol=1e-12, abs_tol=1e-9)
    assert math.isclose(got[2]["policy/kl_penalty"], penalty, rel_tol=1e-12, abs_tol=1e-9)


def test_kl_penalty_holds_back_in_both_directions():
    # the penalty's gradient in log ρ is b(ρ − 1): against the move, whichever way it went
    for ratio, expected in ((1.5, 0.5), (0.5, -0.5)):
        assert abs(loss_and_gradient(KLPen(coef=1.0), ratio, 0.0)[1] - expected) <= 1e-9


def test_kl_penalty_holds_back_beyond_the_largest_ratio():
    # the further the policy has run off, the more it must be pulled back; at 39 nats it is
    assert loss_and_gradient(KLPen(coef=1.0), math.exp(39), 0.0)[1] > 0
    assert loss_and_gradient(KLPen(coef=1.0), math.exp(41), 0.0)[1] > 0


@pytest.mark.parametrize("coef", [0.5, 1.0, 100.0])
def test_penalty_has_no_value_and_no_gradient_at_ratio_one(coef):
    loss, gradient, stats = loss_and_gradient(KLPen(coef=coef), 1.0, 2.0)
    assert (loss, gradient, stats["policy/kl_penalty"]) == (-2.0, -2.0, 0.0)
    # negative control: away from ratio 1 the coefficient shows
    assert abs(loss_and_gradient(KLPen(coef=coef), 1.5, 2.0)[1] - (-3.0)) > 0.2


def test_kl_penalty_with_coef_zero_is_the_plain_ratio():
    loss, gradient, stats = loss_and_gradient(KLPen(coef=0.0, target=None), 1.5, 2.0)
    assert abs(loss + 3.0) <= 1e-9
    assert abs(gradient + 3.0) <= 1e-9
    assert stats["policy/kl_penalty"] == 0.0


def test_kl_penalty_is_the_kl_from_old_to_new_in_expectation():
    # π_old and π_θ over three actions, enumerated: E_old[k3] = KL(π_old‖π_θ), gradient included
    old = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    penalty = KLPen(coef=2.0)((new - old.log()).unsqueeze(0), torch.zeros(1, 3, dtype=torch.float64)).loss
    got = (old * penalty).sum()
    expected = 2 * (old * (old.log() - logits.log_softmax(0))).sum()
    assert_close(got, expected, **TIGHT)
    (slope,) = torch.autograd.grad(got, logits)
    assert_close(slope, torch.autograd.grad(expected, logits)[0], **TIGHT)
    # negative control: KL(π_θ‖π_old) has another gradient
    other = 2 * (logits.softmax(0) * (logits.log_softmax(0) - old.log())).sum()
    assert (slope - torch.autograd.grad(other, logits)[0]).abs().max() > 0.01


def test_kl_penalty_halves_doubles_or_keeps_at_the_thresholds():
    # target 3: below 3/1.5 = 2 halve, above 3·1.5 = 4.5 double, the thresholds themselves keep (PPO §4)
    surrogate = KLPen(coef=1.0, target=3.0)
    for kl_old, coef in ((0.0, 0.5), (1.999, 0.5), (2.0, 1.0), (3.0, 1.0), (4.5, 1.0), (4.501, 2.0), (1e9, 2.0)):
        assert surrogate.adapted(kl_old).coef == coef
        assert surrogate.adapted(kl_old).target == 3.0
    assert surrogate.coef == 1.0


def test_kl_penalty_adapts_from_its_successor():
    moved = KLPen(coef=1.0, target=3.0)
    for _ in range(3):
        moved = moved.adapted(10.0)
    assert moved.coef == 8.0
    assert moved.adapted(0.0).coef == 4.0
    # and the loss follows: b = 8 at ρ = 2, A = 0 is 8(1 − log 2)
    assert abs(loss_and_gradient(moved, 2.0, 0.0)[0] - 8 * (1 - math.log(2))) <= 1e-9


def test_kl_penalty_stays_within_its_bounds_and_comes_back():
    # 2⁻²⁰ < 1e-6 < 2⁻¹⁹ and 2¹⁹ < 1e6 < 2²⁰: twenty steps reach a bound, no number reaches 0 or inf
    low = high = KLPen(coef=1.0, target=1.0)
    for _ in range(1100):  # 2⁻¹¹⁰⁰ is 0 in float64
        low, high = low.adapted(0.0), high.adapted(9.0)
    assert (low.coef, high.coef) == (1e-6, 1e6)
    assert (low.adapted(9.0).coef, high.adapted(0.0).coef) == (2e-6, 5e5)
    # a start beyond the bounds is kept, and may move inwards only
    outside = KLPen(coef=1e-8, target=1.0), KLPen(coef=1e8, target=1.0)
    assert [x.adapted(1.0).coef for x in outside] == [1e-8, 1e8]
    assert (outside[0].adapted(0.0).coef, outside[1].adapted(9.0).coef) == (1e-8, 1e8)
    assert (outside[0].adapted(9.0).coef, outside[1].adapted(0.0).coef) == (2e-8, 5e7)


def test_kl_penalty_without_target_is_fixed():
    fixed = KLPen(coef=2.0, target=None)
    assert not fixed.adaptive
    assert KLPen(coef=2.0, target=0.1).adaptive
    assert fixed.moving() == ()
    assert fixed.state() == {}
    for kl_old in (0.0, 1.0, 1e9, float("nan")):
        assert fixed.adapted(kl_old).coef == 2.0


def test_kl_penalty_state_round_trip():
    moved = KLPen(coef=1.0, target=3.0).adapted(10.0)
    assert moved.state() == {"coef": 2.0}
    assert KLPen(coef=1.0, target=3.0).restored(moved.state()) == moved
    assert KLPen(coef=1.0, target=5.0).restored(moved.state()) == KLPen(coef=2.0, target=5.0)


def test_each_argument_of_kl_penalty_moves_something():
    # coef: b(2 − 1 − log 2); target: the same KL of 1 is above, at or below it
    for coef in (0.5, 3.0):
        assert abs(loss_and_gradient(KLPen(coef=coef), 2.0, 0.0)[0] - coef * (1 - math.log(2))) <= 1e-9
    assert [KLPen(target=target).adapted(1.0).coef for target in (0.1, 1.0, 10.0, None)] == [2.0, 1.0, 0.5, 1.0]


def test_kl_penalty_refuses_numbers_out_of_range():
    for bad in (0.0, -0.2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`target` must be a number above 0: got"):
            KLPen(target=bad)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`coef` must be a number of at least 0: got"):
            KLPen(coef=bad)
    with pytest.raises(ValueError, match="`coef`=0 can't adapt: doubling 0 gives 0; set `target` to None"):
        KLPen(coef=0.0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"after the update is (nan|inf): lower the learning rate or raise `coef`"):
            KLPen().adapted(bad)
