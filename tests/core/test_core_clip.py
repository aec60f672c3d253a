import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import CISPO, Clip, ImportanceSampling

TIGHT = {"rtol": 0, "atol": 1e-9}
LOG_RATIOS = st.floats(-3, 5)
ADVANTAGES = st.one_of(st.floats(0.01, 10), st.floats(-10, -0.01))
BOUNDS = st.floats(0.01, 3)


def loss_and_gradient(surrogate, ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), log_ratio)
    assert list(out.stats) == ["policy/clipfrac_avg"]
    return out.loss.item(), gradient.item(), out.stats["policy/clipfrac_avg"].item()


def check(surrogate, ratio, advantage, loss, gradient, clipped):
    got = loss_and_gradient(surrogate, ratio, advantage)
    assert abs(got[0] - loss) <= 1e-9
    assert abs(got[1] - gradient) <= 1e-9
    assert got[2] == clipped


# Clip: loss = −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)A); its gradient in log ρ is −ρA where it is not clipped.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, 1.0),  # min(3, 2.4): above the bound and good, stop
        (1.5, -2.0, 3.0, 3.0, 0.0),  # min(−3, −2.4): above the bound and bad, come back
        (0.5, 2.0, -1.0, -1.0, 0.0),  # min(1, 1.6): below the bound and good, come back
        (0.5, -2.0, 1.6, 0.0, 1.0),  # min(−1, −1.6): below the bound and bad, stop
        (1.1, 2.0, -2.2, -2.2, 0.0),  # between the bounds
        (0.9, -2.0, 1.8, 1.8, 0.0),
        (1.0, 2.0, -2.0, -2.0, 0.0),  # both branches tie: the whole gradient, not half
        (1.0, -2.0, 2.0, 2.0, 0.0),
        (1.5, 0.0, 0.0, 0.0, 0.0),  # no advantage, nothing to clip
    ],
)
def test_clip_equals_hand_values(ratio, advantage, loss, gradient, clipped):
    check(Clip(epsilon=0.2), ratio, advantage, loss, gradient, clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.25, 2.0, -2.5, -2.5, 0.0),  # 1.2 < 1.25 < 1.28: the ε of below would stop here, at −2.4
        (1.5, 2.0, -2.56, 0.0, 1.0),  # min(3, 1.28·2)
        (0.75, -2.0, 1.6, 0.0, 1.0),  # 0.72 < 0.75 < 0.8: the ε of above would go on, at 1.5
        (0.5, -2.0, 1.6, 0.0, 1.0),
        (1.5, -2.0, 3.0, 3.0, 0.0),
        (0.5, 2.0, -1.0, -1.0, 0.0),
    ],
)
def test_clip_with_two_bounds_equals_hand_values(ratio, advantage, loss, gradient, clipped):
    check(Clip(epsilon=0.2, epsilon_high=0.28), ratio, advantage, loss, gradient, clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (5.0, -1.0, 3.0, 0.0, 1.0),  # objective −3 and not −5
        (50.0, -1.0, 3.0, 0.0, 1.0),  # nor −50
        (2.5, -1.0, 2.5, 2.5, 0.0),  # above 1 + ε, not yet at the floor: come back
        (0.5, -1.0, 0.8, 0.0, 1.0),  # the ordinary bound still holds
        (5.0, 1.0, -1.2, 0.0, 1.0),  # A > 0: as without
        (0.5, 1.0, -0.5, -0.5, 0.0),
        (50.0, -2.0, 6.0, 0.0, 1.0),  # c·A = −6
    ],
)
def test_dual_clip_equals_hand_values(ratio, advantage, loss, gradient, clipped):
    check(Clip(epsilon=0.2, dual=3.0), ratio, advantage, loss, gradient, clipped)


def test_dual_clip_counts_what_it_floors(float64):
    # ρ = 5, 50, 2.5 and A = −1: floored, floored, free; ρ = 5, A = 1: clipped above. Half as many without c
    x, a = float64([[5.0, 50.0, 2.5, 5.0]]).log(), float64([[-1.0, -1.0, -1.0, 1.0]])
    assert Clip(dual=3.0)(x, a).stats["policy/clipfrac_avg"].mean() == 0.75
    assert Clip()(x, a).stats["policy/clipfrac_avg"].mean() == 0.25


@given(LOG_RATIOS, st.one_of(ADVANTAGES, st.just(0.0)), BOUNDS, st.none() | BOUNDS, st.none() | st.floats(1.01, 20))
@settings(deadline=None, max_examples=30)
def test_clip_equals_a_naive_scalar(log_ratio, advantage, epsilon, epsilon_high, dual):
    def objective(x):
        ratio, high = math.exp(x), epsilon if epsilon_high is None else epsilon_high
        held = 1 - epsilon if ratio < 1 - epsilon else 1 + high if ratio > 1 + high else ratio
        pessimistic = min(ratio * advantage, held * advantage)
        return max(pessimistic, dual * advantage) if dual is not None and advantage < 0 else pessimistic

    surrogate = Clip(epsilon=epsilon, epsilon_high=epsilon_high, dual=dual)
    x = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    out = surrogate(x, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), x)
    assert abs(out.loss.item() + objective(log_ratio)) <= 1e-9
    # the naive objective is flat to both sides where the action counts as clipped, and −ρA steep where not
    near = [objective(log_ratio + step) - objective(log_ratio) for step in (-1e-6, 1e-6)]
    assume((near[0] == 0) == (near[1] == 0))  # not within 1e-6 of a kink
    flat = near == [0, 0] and advantage != 0
    assert out.stats["policy/clipfrac_avg"].item() == float(flat)
    assert abs(gradient.item() - (0.0 if flat else -math.exp(log_ratio) * advantage)) <= 1e-9


@given(st.lists(st.tuples(LOG_RATIOS, ADVANTAGES), min_size=1, max_size=20), st.sampled_from([None, 3.0]))
@settings(deadline=None, max_examples=30)
def test_clip_has_no_gradient_exactly_where_it_says_so(actions, dual):
    x = torch.tensor([[x for x, _ in actions]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[a for _, a in actions]], dtype=torch.float64)
    out = Clip(epsilon=0.2, epsilon_high=0.28, dual=dual)(x, a)
    (gradient,) = torch.autograd.grad(out.loss.sum(), x)
    assert torch.equal(gradient == 0, out.stats["policy/clipfrac_avg"] == 1)


def test_clip_pulls_back_or_counts_a_bad_action_beyond_the_largest_ratio():
    # A < 0 and log ρ = 41, which a response of 410 tokens reaches at 0.1 nats per token; at 39 it is pulled back
    assert loss_and_gradient(Clip(), math.exp(39), -1.0)[1] > 0
    _, gradient, clipped = loss_and_gradient(Clip(), math.exp(41), -1.0)
    assert gradient > 0 or clipped == 1


def test_clip_is_never_above_the_plain_objective_and_ends_with_epsilon():
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64).unsqueeze(0)
    for advantage in (1.5, -1.5):
        advantages = torch.full_like(log_ratio, advantage)
        plain = -log_ratio.exp() * advantages
        assert (Clip(epsilon=0.2)(log_ratio, advantages).loss >= plain - 1e-12).all()
        assert (Clip(epsilon=0.2)(log_ratio, advantages).loss > plain + 0.1).any()
        # ε → ∞ is the plain ρÂ, gradient included
        x = log_ratio.clone().requires_grad_()
        wide = Clip(epsilon=1e6)(x, advantages)
        assert_close(wide.loss, plain, **TIGHT)
        assert_close(torch.autograd.grad(wide.loss.sum(), x)[0], plain, **TIGHT)
        assert_close(wide.loss, ImportanceSampling()(log_ratio, advantages).loss, **TIGHT)
        assert wide.stats["policy/clipfrac_avg"].eq(0).all()
        # and a huge c is no floor
        high = Clip(epsilon=0.2, dual=1e9)(log_ratio, advantages)
        assert_close(high.loss, Clip(epsilon=0.2)(log_ratio, advantages).loss, **TIGHT)
        assert_close(high.stats, Clip(epsilon=0.2)(log_ratio, advantages).stats, **TIGHT)


def test_epsilon_high_of_none_is_epsilon(float64):
    x, a = torch.linspace(-1, 1, 21, dtype=torch.float64).unsqueeze(0), float64([[1.0, -1.0, 2.0] * 7])
    assert_close(Clip(epsilon=0.3)(x, a), Clip(epsilon=0.3, epsilon_high=0.3)(x, a), **TIGHT)
    # negative control
    assert (Clip(epsilon=0.3)(x, a).loss - Clip(epsilon=0.3, epsilon_high=0.2)(x, a).loss).abs().max() > 0.09


def test_each_argument_of_clip_moves_the_loss():
    # ρ = 1.5, A = 1: 1 + ε while ε < 0.5; ρ = 0.5, A = −1: 1 − ε; ρ = 9, A = −1: c
    for epsilon, above, below in ((0.1, -1.1, 0.9), (0.3, -1.3, 0.7), (0.6, -1.5, 0.5)):
        assert abs(loss_and_gradient(Clip(epsilon=epsilon), 1.5, 1.0)[0] - above) <= 1e-9
        assert abs(loss_and_gradient(Clip(epsilon=epsilon), 0.5, -1.0)[0] - below) <= 1e-9
        assert abs(loss_and_gradient(Clip(epsilon_high=epsilon), 1.5, 1.0)[0] - above) <= 1e-9
        assert abs(loss_and_gradient(Clip(epsilon_high=epsilon), 0.5, -1.0)[0] - 0.8) <= 1e-9
    for dual, loss in ((None, 9.0), (3.0, 3.0), (1.5, 1.5)):
        assert abs(loss_and_gradient(Clip(dual=dual), 9.0, -1.0)[0] - loss) <= 1e-9


def test_clip_refuses_numbers_out_of_range():
    for bad in (0.0, -0.2, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`epsilon` must be a number above 0: got"):
            Clip(epsilon=bad)
        with pytest.raises(ValueError, match="`epsilon_high` must be a number above 0: got"):
            Clip(epsilon_high=bad)
    for bad in (1.0, 0.5, 0.0, -3.0, float("nan")):
        with pytest.raises(ValueError, match="`dual` must be above 1"):
            Clip(dual=bad)


# CISPO: loss = −sg[clip(ρ, smallest, largest)]·A·log ρ, so its gradient in log ρ is −weight·A everywhere.


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "clipped"),
    [
        (2.0, 3.0, -6.0, 0.0),
        (2.0, -3.0, 6.0, 0.0),
        (9.0, 3.0, -15.0, 1.0),  # weight 5
        (9.0, -3.0, 15.0, 1.0),  # pushed down as well, where Clip is unbounded and the dual clip stops
        (0.1, 3.0, -1.5, 1.0),  # weight 0.5
        (0.1, -3.0, 1.5, 1.0),
        (1.0, 3.0, -3.0, 0.0),  # REINFORCE
    ],
)
def test_cispo_equals_hand_values(ratio, advantage, gradient, clipped):
    # the loss is the gradient times log ρ: the weight is no part of what is differentiated
    check(CISPO(largest=5.0, smallest=0.5), ratio, advantage, gradient * math.log(ratio), gradient, clipped)


@given(LOG_RATIOS, ADVANTAGES, st.floats(0, 1), st.floats(1, 50))
@settings(deadline=None, max_examples=30)
def test_cispo_keeps_the_gradient_of_every_action(log_ratio, advantage, smallest, largest):
    x = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    out = CISPO(largest=largest, smallest=smallest)(x, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), x)
    weight = sorted([smallest, math.exp(log_ratio), largest])[1]  # the middle one
    assert abs(gradient.item() + weight * advantage) <= 1e-9
    assert abs(out.loss.item() + weight * advantage * log_ratio) <= 1e-9
    assert gradient.item() != 0
    assert out.stats["policy/clipfrac_avg"].item() == float(not smallest <= math.exp(log_ratio) <= largest)


@given(LOG_RATIOS, ADVANTAGES)
@settings(deadline=None, max_examples=30)
def test_cispo_without_bounds_has_the_gradient_of_the_plain_ratio(log_ratio, advantage):
    _, gradient, clipped = loss_and_gradient(CISPO(largest=1e9, smallest=0.0), math.exp(log_ratio), advantage)
    assert abs(gradient + math.exp(log_ratio) * advantage) <= 1e-9
    assert clipped == 0


def test_cispo_goes_on_where_clip_stops():
    # ρ = 3 and good, ρ = 0.3 and bad: Clip has no gradient, CISPO's is −ρA
    for ratio, advantage in ((3.0, 1.0), (0.3, -1.0)):
        assert loss_and_gradient(Clip(), ratio, advantage)[1] == 0
        assert abs(loss_and_gradient(CISPO(), ratio, advantage)[1] + ratio * advantage) <= 1e-9


def test_each_argument_of_cispo_moves_the_gradient():
    for largest, gradient in ((2.0, -2.0), (5.0, -5.0), (20.0, -9.0)):
        assert abs(loss_and_gradient(CISPO(largest=largest), 9.0, 1.0)[1] - gradient) <= 1e-9
    for smallest, gradient in ((0.0, -0.1), (0.3, -0.3), (1.0, -1.0)):
        assert abs(loss_and_gradient(CISPO(smallest=smallest), 0.1, 1.0)[1] - gradient) <= 1e-9


def test_cispo_refuses_numbers_out_of_range():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`largest` must be a number above 0: got"):
            CISPO(largest=bad)
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`smallest` must be a number of at least 0: got"):
            CISPO(smallest=bad)
    with pytest.raises(ValueError, match="`smallest` must not exceed `largest`: got 3.0 and 2.0"):
        CISPO(largest=2.0, smallest=3.0)
