from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import Combination, MeanReward, UncertaintyWeighted, WorstReward

TIGHT = {"rtol": 0, "atol": 1e-9}
RULES = [MeanReward(), WorstReward(), UncertaintyWeighted(), UncertaintyWeighted(coef=3.0)]


def test_combinations_equal_hand_values(float64):
    # three members, two responses: 1, 2, 6 and −1, −1, −4
    scores = float64([[1.0, -1.0], [2.0, -1.0], [6.0, -4.0]])
    assert_close(MeanReward()(scores), float64([3.0, -2.0]), **TIGHT)
    assert_close(WorstReward()(scores), float64([1.0, -4.0]), **TIGHT)
    # variances (4 + 1 + 9)/3 = 14/3 and (1 + 1 + 4)/3 = 2: 3 − ½·14/3 = 2/3, −2 − ½·2 = −3
    assert_close(UncertaintyWeighted(coef=0.5)(scores), float64([2 / 3, -3.0]), **TIGHT)
    # negative control: the unbiased variance would be 7 and 3
    assert abs(float(UncertaintyWeighted(coef=0.5)(scores)[0]) - (3 - 0.5 * 7)) > 1


def test_uncertainty_weight_is_the_price_of_the_variance(float64):
    # 0 and 2: mean 1, variance 1, so 1 − λ; the default λ is 0.1
    scores = float64([[0.0], [2.0]])
    for coef in (0.1, 0.5, 4.0):
        assert_close(UncertaintyWeighted(coef=coef)(scores), float64([1 - coef]), **TIGHT)
    assert UncertaintyWeighted() == UncertaintyWeighted(coef=0.1)


members = st.lists(st.lists(st.floats(-50, 50), min_size=3, max_size=3), min_size=1, max_size=5)


@given(members, st.floats(0.01, 5))
@settings(deadline=None, max_examples=30)
def test_combinations_equal_naive_loops(rows, coef):
    scores = torch.tensor(rows, dtype=torch.float64)
    for b in range(3):
        column = [row[b] for row in rows]
        mean = sum(column) / len(column)
        variance = sum((v - mean) ** 2 for v in column) / len(column)
        assert abs(float(MeanReward()(scores)[b]) - mean) <= 1e-9
        assert float(WorstReward()(scores)[b]) == min(column)
        assert abs(float(UncertaintyWeighted(coef=coef)(scores)[b]) - (mean - coef * variance)) <= 1e-9


@given(members)
@settings(deadline=None, max_examples=20)
def test_doubt_never_raises_a_score(rows):
    scores = torch.tensor(rows, dtype=torch.float64)
    mean = MeanReward()(scores)
    # 1e-9: the mean of equal numbers rounds
    assert (WorstReward()(scores) <= mean + 1e-9).all()
    assert (UncertaintyWeighted(coef=0.7)(scores) <= mean).all()
    assert (UncertaintyWeighted(coef=1.4)(scores) <= UncertaintyWeighted(coef=0.7)(scores)).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_member_is_itself(float64, rule):
    scores = float64([0.1, -3.0, 7.0])
    assert torch.equal(rule(scores.unsqueeze(0)), scores)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_members_who_agree_give_their_score(float64, rule):
    scores = float64([0.5, -3.0, 7.0])
    assert torch.equal(rule(scores.expand(4, 3)), scores)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_order_of_members_has_no_influence(float64, rule):
    scores = float64([[1.0, -1.0], [2.5, -1.0], [6.0, -4.0]])
    for order in permutations(range(3)):
        assert_close(rule(scores[list(order)]), rule(scores), **TIGHT)
    # responses keep their places; negative control: members and responses are not the same axis
    assert_close(rule(scores.flip(1)), rule(scores).flip(0), **TIGHT)
    assert rule(scores).shape == (2,)
    assert rule(scores.T).shape == (3,)


def test_rules_differ_where_members_do(float64):
    scores = float64([[0.0], [2.0]])
    assert len({float(rule(scores)) for rule in RULES}) == 4


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_an_unknown_score_shows(float64, rule):
    scores = float64([[1.0, 2.0], [float("nan"), 3.0]])
    got = rule(scores)
    assert got[0].isnan()
    assert got[1].isfinite()


@pytest.mark.parametrize("bad", [0.0, -0.1, float("nan"), float("inf")])
def test_uncertainty_weighted_refuses_a_price_that_is_none(bad):
    with pytest.raises(ValueError, match="`coef` must be a number above 0: got"):
        UncertaintyWeighted(coef=bad)


def test_combination_is_abstract():
    with pytest.raises(TypeError):
        Combination()
