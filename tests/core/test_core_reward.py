import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import penalized_rewards

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def test_penalized_rewards_equal_hand_values(float64):
    scores = float64([10.0, 20.0, 30.0])
    kl_ref = float64([[1.0, 2.0, 3.0], [4.0, -5.0, 6.0], [7.0, 8.0, 9.0]])
    # β = 0.1: −0.1, −0.2, −0.3 + 10 | −0.4, 0.5 + 20, masked | −0.7 + 30, masked, masked
    expected = float64([[-0.1, -0.2, 9.7], [-0.4, 20.5, 0.0], [29.3, 0.0, 0.0]])
    assert_close(penalized_rewards(scores, kl_ref, MASK, coef=0.1), expected, **TIGHT)


def test_with_one_action_the_reward_is_that_of_the_bandit(float64):
    # r − β·log(π_old/π_ref): 2 − 0.5·0.6 = 1.7, −1 − 0.5·(−0.4) = −0.8
    got = penalized_rewards(
        float64([2.0, -1.0]), float64([[0.6], [-0.4]]), torch.ones(2, 1, dtype=torch.bool), coef=0.5
    )
    assert_close(got, float64([[1.7], [-0.8]]), **TIGHT)


def test_penalized_rewards_of_padding_are_zero_whatever_it_holds(float64):
    scores = float64([10.0, 20.0, 30.0])
    clean = float64([[1.0, 2.0, 3.0], [4.0, -5.0, 0.0], [7.0, 0.0, 0.0]])
    expected = penalized_rewards(scores, clean, MASK, coef=0.1)
    for junk in (NAN, math.inf, 1e300):
        got = penalized_rewards(scores, clean.masked_fill(~MASK, junk), MASK, coef=0.1)
        assert torch.equal(got, expected)
    assert expected[~MASK].eq(0).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.floats(0, 5), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_score_lands_on_the_last_action_of_every_row(lengths, coef, seed):
    generator = torch.Generator().manual_seed(seed)
    kl_ref = torch.randn(len(lengths), 6, dtype=torch.float64, generator=generator)
    scores = torch.randn(len(lengths), dtype=torch.float64, generator=generator)
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    got = penalized_rewards(scores, kl_ref, mask, coef=coef).tolist()
    for i, length in enumerate(lengths):
        for t in range(6):
            expected = -coef * float(kl_ref[i, t]) if t < length else 0.0
            expected += float(scores[i]) if t == length - 1 else 0.0
            assert abs(got[i][t] - expected) <= 1e-9


def test_score_is_counted_once_per_response(float64):
    got = penalized_rewards(float64([3.0, 4.0, 5.0]), torch.zeros(3, 3, dtype=torch.float64), MASK, coef=1.0)
    assert_close(got.sum(1), float64([3.0, 4.0, 5.0]), **TIGHT)
    # negative control: on the last *column* the score of the ragged rows would be lost
    assert got[:, -1].tolist() == [3.0, 0.0, 0.0]


def test_raising_beta_lowers_the_reward_where_the_policy_left_the_reference(float64):
    # facts B5: the penalty has a minus; with log π_old < log π_ref it is the other way round
    scores, above = float64([1.0]), float64([[0.5, 0.2]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    low, high = (penalized_rewards(scores, above, mask, coef=beta).sum() for beta in (0.1, 0.2))
    assert high < low
    low, high = (penalized_rewards(scores, -above, mask, coef=beta).sum() for beta in (0.1, 0.2))
    assert high > low


def test_penalized_rewards_take_the_dtype_of_the_kl():
    got = penalized_rewards(
        torch.ones(1, dtype=torch.float64), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), coef=0.1
    )
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "kl_ref", "mask", "shown"),
    [
        ((3,), (2, 4), (2, 4), r"got \(3,\), \(2, 4\) and \(2, 4\)"),
        ((2,), (2, 4), (2, 3), r"got \(2,\), \(2, 4\) and \(2, 3\)"),
        ((2, 1), (2, 4), (2, 4), r"got \(2, 1\), \(2, 4\) and \(2, 4\)"),
        ((2,), (2, 1), (2, 4), r"got \(2,\), \(2, 1\) and \(2, 4\)"),
    ],
)
def test_penalized_rewards_refuse_shapes_that_do_not_match(scores, kl_ref, mask, shown):
    with pytest.raises(ValueError, match=shown):
        penalized_rewards(torch.zeros(scores), torch.zeros(kl_ref), torch.ones(mask, dtype=torch.bool), coef=0.1)
