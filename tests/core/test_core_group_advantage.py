import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    AdvantageEstimator,
    BanditAdvantage,
    BatchMean,
    BatchStd,
    GroupAdvantage,
    GroupScale,
    GroupStd,
    LeaveOneOut,
    NoScale,
    Whitened,
    local,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
SCALES = [GroupStd(), BatchStd(), NoScale()]


def credit(estimator, totals, groups, *, all_sum=local):
    """Responses of one action."""
    rewards = totals.unsqueeze(1)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=all_sum)


def advantages(estimator, totals, groups, *, all_sum=local):
    return credit(estimator, totals, groups, all_sum=all_sum).advantages.squeeze(1)


def ids(*groups):
    return torch.tensor(groups)


# Hand values.


def test_group_advantage_equals_hand_values(float64):
    totals, groups = float64([1.0, 10.0, 2.0, 30.0, 6.0]), ids(7, -3, 7, -3, 7)
    # group 7: 1, 2, 6, mean 3, std √7; group −3: 10, 30, mean 20, std √200
    distance = [-2.0, -10.0, -1.0, 10.0, 3.0]
    assert_close(advantages(GroupAdvantage(scale=NoScale()), totals, groups), float64(distance), **TIGHT)
    unit = {7: math.sqrt(7) + 1e-4, -3: math.sqrt(200) + 1e-4}
    expected = [d / unit[g] for d, g in zip(distance, groups.tolist(), strict=True)]
    assert_close(advantages(GroupAdvantage(), totals, groups), float64(expected), **TIGHT)
    # all five: mean 9.8, squares 77.44 + 0.04·… = Σx² − 5·9.8² = 1041 − 480.2 = 560.8, over 4
    unit = math.sqrt(560.8 / 4) + 1e-4
    got = advantages(GroupAdvantage(scale=BatchStd()), totals, groups)
    assert_close(got, float64([d / unit for d in distance]), **TIGHT)


def test_group_advantage_defaults_are_grpo_with_the_guard_of_trl():
    assert GroupAdvantage() == GroupAdvantage(scale=GroupStd(guard=1e-4))
    assert BatchStd() == BatchStd(guard=1e-4)
    assert GroupAdvantage().needs_group
    assert not GroupAdvantage().needs_value
    assert Whitened(estimator=GroupAdvantage()).needs_group


@pytest.mark.parametrize("scale", [GroupStd, BatchStd])
def test_guard_is_added_to_the_deviation(float64, scale):
    # rewards ∓1 in one group: std √2, so ∓1/(√2 + guard); a guard added to the variance would give 1/√(2 + guard)
    for guard in (1e-4, 0.5, 3.0):
        got = advantages(GroupAdvantage(scale=scale(guard=guard)), float64([-1.0, 1.0]), ids(0, 0))
        unit = math.sqrt(2) + guard
        assert_close(got, float64([-1 / unit, 1 / unit]), **TIGHT)


def test_scales_give_the_unit_itself(float64):
    totals, groups = float64([0.0, 2.0, 5.0, 5.0]), ids(1, 1, 0, 0)
    root = math.sqrt(2) + 0.25
    got = GroupStd(guard=0.25)(totals, groups, local)
    assert_close(got, float64([root, root, 0.25, 0.25]), **TIGHT)
    # mean 3, squares 9 + 1 + 4 + 4 = 18, over 3
    assert_close(BatchStd(guard=0.25)(totals, groups, local), float64([math.sqrt(6) + 0.25] * 4), **TIGHT)
    assert torch.equal(NoScale()(totals, groups, local), float64([1.0] * 4))


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_group_advantage_sits_on_every_action_and_returns_are_the_rewards(float64, scale):
    # totals 7, 5 and 3, 3: masked junk left out
    rewards = float64([[1.0, 2.0, 4.0], [5.0, NAN, 100.0], [3.0, NAN, NAN], [1.0, 2.0, NAN]])
    mask = torch.tensor([[True] * 3, [True, False, False], [True, False, False], [True, True, False]])
    groups = ids(0, 0, 1, 1)
    got = GroupAdvantage(scale=scale)(rewards, torch.full_like(rewards, NAN), mask, groups=groups, all_sum=local)
    flat = advantages(GroupAdvantage(scale=scale), float64([7.0, 5.0, 3.0, 3.0]), groups)
    assert_close(got.advantages, torch.where(mask, flat.unsqueeze(1), 0.0), **TIGHT)
    expected = float64([[7.0] * 3, [5.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    assert torch.equal(got.returns, expected)


groups_of_rewards = st.lists(st.lists(st.floats(-50, 50), min_size=2, max_size=5), min_size=1, max_size=4)


def interleaved(rewards, random):
    """All rewards in a random order, with ids that are neither sorted nor contiguous."""
    rows = [(17 - 29 * g, r) for g, group in enumerate(rewards) for r in group]
    random.shuffle(rows)
    return torch.tensor([r for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows])


@given(groups_of_rewards, st.randoms(use_true_random=False), st.floats(0.1, 2))
@settings(deadline=None, max_examples=25)
def test_group_advantage_equals_a_naive_loop(rewards, random, guard):
    totals, groups = interleaved(rewards, random)
    got = {
        scale: advantages(GroupAdvantage(scale=scale), totals, groups)
        for scale in (GroupStd(guard=guard), BatchStd(guard=guard), NoScale())
    }
    everything = totals.tolist()
    centre = sum(everything) / len(everything)
    whole = math.sqrt(sum((r - centre) ** 2 for r in everything) / (len(everything) - 1))
    for i, r in enumerate(everything):
        own = [everything[j] for j in range(len(everything)) if groups[j] == groups[i]]
        mean = sum(own) / len(own)
        std = math.sqrt(sum((x - mean) ** 2 for x in own) / (len(own) - 1))
        units = {GroupStd(guard=guard): std + guard, BatchStd(guard=guard): whole + guard, NoScale(): 1.0}
        for scale, unit in units.items():
            assert abs(float(got[scale][i]) - (r - mean) / unit) <= 1e-9


# Facts 16.


@given(groups_of_rewards, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_group_advantages_sum_to_zero_per_group(rewards, random):
    totals, groups = interleaved(rewards, random)
    for scale in (GroupStd(guard=0.1), BatchStd(guard=0.1), NoScale()):
        got = advantages(GroupAdvantage(scale=scale), totals, groups)
        for g in set(groups.tolist()):
            assert abs(float(got[groups == g].sum())) <= 1e-9


@given(groups_of_rewards, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_leave_one_out_is_the_unscaled_group_advantage_stretched(rewards, random):
    # RLOO = k/(k − 1)·Dr. GRPO
    totals, groups = interleaved(rewards, random)
    plain = advantages(GroupAdvantage(scale=NoScale()), totals, groups)
    left_out = advantages(BanditAdvantage(baseline=LeaveOneOut()), totals, groups)
    k = torch.tensor([float((groups == g).sum()) for g in groups], dtype=torch.float64)
    assert_close(left_out, plain * k / (k - 1), **TIGHT)


def test_group_std_advantage_forgets_scale_and_shift_up_to_its_guard(float64):
    # std ½: A = d·a/(a/2 + guard)
    totals, groups = float64([-0.5, 0.0, 0.5]), ids(5, 5, 5)
    base = advantages(GroupAdvantage(), totals, groups)
    assert_close(base[2], float64(0.5 / 0.5001), **TIGHT)
    small = advantages(GroupAdvantage(), 0.01 * totals + 7, groups)
    # 0.005/(0.005 + 1e-4) = 0.98039 against 0.9998: 1.94 % less
    assert_close(small[2], float64(0.005 / 0.0051), **TIGHT)
    assert 0.019 < float(1 - small[2] / base[2]) < 0.02
    # without a guard to speak of, the invariance is exact
    bare = GroupAdvantage(scale=GroupStd(guard=1e-13))
    assert_close(advantages(bare, 0.01 * totals + 7, groups), advantages(bare, totals, groups), **TIGHT)
    # negative controls: a < 0 turns the sign; without a unit the scale shows
    assert_close(advantages(bare, -totals, groups), -advantages(bare, totals, groups), **TIGHT)
    plain = advantages(GroupAdvantage(scale=NoScale()), 0.01 * totals + 7, groups)
    assert_close(plain, 0.01 * totals, **TIGHT)


@given(st.floats(0.01, 100), st.floats(-100, 100), st.floats(1e-6, 1))
@settings(deadline=None, max_examples=25)
def test_scaled_rewards_are_scaled_in_units_with_the_guard(a, b, guard):
    # A(a·r + b; guard) = A(r; guard/a): what the guard costs, for both units
    totals = torch.tensor([0.0, 1.0, 5.0, -2.0, 2.0], dtype=torch.float64)
    groups = ids(0, 0, 0, 1, 1)
    for scale in (GroupStd, BatchStd):
        got = advantages(GroupAdvantage(scale=scale(guard=guard)), a * totals + b, groups)
        expected = advantages(GroupAdvantage(scale=scale(guard=guard / a)), totals, groups)
        assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("scale", [GroupStd(guard=1e-12), BatchStd(guard=1e-12), *SCALES], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 3, 7, 11])
def test_a_group_of_equal_rewards_gives_exactly_zero(scale, dtype, k):
    # 0.1 is no binary fraction: 7 copies in float32 and 3 in float64 have another mean than 0.1
    totals = torch.full((k,), 0.1, dtype=dtype)
    got = credit(GroupAdvantage(scale=scale), totals, torch.zeros(k, dtype=torch.int64))
    assert torch.equal(got.advantages, torch.zeros(k, 1, dtype=dtype))
    # beside another group, and not only alone
    both = torch.cat([totals, torch.tensor([0.0, 1.0], dtype=dtype)])
    groups = torch.tensor([3] * k + [-1] * 2)
    got = advantages(GroupAdvantage(scale=scale), both, groups)
    assert torch.equal(got[:k], torch.zeros(k, dtype=dtype))
    assert got[k] < 0 < got[k + 1]


def test_rounding_would_be_blown_up_without_that_rule():
    # negative control: 0.1 less its rounded mean, in units of a small guard, is no small number
    totals = torch.full((7,), 0.1)
    assert float((totals - totals.sum() / 7).abs().max()) / 1e-12 > 1000


def test_almost_equal_rewards_are_held_by_the_guard(float64):
    # spread 1e-6 against a guard of 1e-4: the advantage is 1 % of a clear difference's
    totals = float64([0.0, 1e-6])
    got = advantages(GroupAdvantage(), totals, ids(0, 0))
    assert_close(got[1], float64(5e-7 / (1e-6 / math.sqrt(2) + 1e-4)), **TIGHT)
    assert got[1] < 0.01


def test_group_std_weighs_prompts_alike_and_batch_std_does_not(float64):
    # spreads 1 and 10: in units of the own group both are ±1/√2; in one unit for all they keep the ratio 10
    totals, groups = float64([0.0, 1.0, 0.0, 10.0]), ids(0, 0, 1, 1)
    own = advantages(GroupAdvantage(scale=GroupStd(guard=1e-12)), totals, groups)
    root = 1 / math.sqrt(2)
    assert_close(own, float64([-root, root, -root, root]), **TIGHT)
    for scale in (BatchStd(), NoScale()):
        shared = advantages(GroupAdvantage(scale=scale), totals, groups)
        assert_close(shared[2:], 10 * shared[:2], **TIGHT)


# Ranks.


def test_batch_std_of_two_ranks_equals_one(as_ranks, float64):
    # ranks of 2 and 3 responses; all five: mean 9.8, Σx² = 1041, std √(560.8/4)
    ranks = [(float64([10.0, 30.0]), ids(0, 0)), (float64([1.0, 2.0, 6.0]), ids(1, 1, 1))]
    estimator = GroupAdvantage(scale=BatchStd())
    got = as_ranks(lambda r, all_sum: advantages(estimator, *ranks[r], all_sum=all_sum))
    unit = math.sqrt(560.8 / 4) + 1e-4
    assert_close(torch.cat(got), float64([d / unit for d in (-10.0, 10.0, -2.0, -1.0, 3.0)]), **TIGHT)
    # negative control: a rank's own deviation of 10 and 30 is √200
    assert abs(float(advantages(estimator, *ranks[0])[0]) - float(got[0][0])) > 0.1


@pytest.mark.parametrize("scale", [GroupStd(), NoScale()], ids=repr)
def test_units_of_a_group_do_not_depend_on_other_ranks(as_ranks, float64, scale):
    # the same id on two ranks names two prompts: groups live on one rank
    ranks = [float64([10.0, 30.0]), float64([1.0, 2.0])]
    estimator = GroupAdvantage(scale=scale)
    got = as_ranks(lambda r, all_sum: advantages(estimator, ranks[r], ids(0, 0), all_sum=all_sum))
    assert_close(torch.cat(got), torch.cat([advantages(estimator, x, ids(0, 0)) for x in ranks]), **TIGHT)


# Facts 14 and 4.

ESTIMATORS = [*(GroupAdvantage(scale=s) for s in SCALES), BanditAdvantage(baseline=LeaveOneOut())]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_group_ids_and_not_positions_define_groups(float64, estimator):
    totals, groups = float64([1.0, 10.0, 2.0, 30.0, 6.0, 0.5]), ids(7, -3, 7, -3, 7, -3)
    base = advantages(estimator, totals, groups)
    for seed in range(6):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        assert_close(advantages(estimator, totals[order], groups[order]), base[order], **TIGHT)
    # any names will do
    for a, b in ((0, 1), (1, 0), (-(2**62), 2**62), (5, 4)):
        assert_close(advantages(estimator, totals, torch.where(groups == 7, a, b)), base, **TIGHT)
    # negative control: neighbors are another grouping
    assert (advantages(estimator, totals, ids(0, 0, 0, 1, 1, 1)) - base).abs().max() > 0.1


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_a_constant_in_the_reward_changes_nothing(float64, estimator):
    totals, groups = float64([1.0, 10.0, 2.0, 30.0]), ids(0, 1, 0, 1)
    assert_close(advantages(estimator, totals + 50, groups), advantages(estimator, totals, groups), **TIGHT)


PER_PROMPT = [e for e in ESTIMATORS if e != GroupAdvantage(scale=BatchStd())]


@pytest.mark.parametrize("estimator", PER_PROMPT, ids=repr)
def test_a_number_per_prompt_in_the_reward_changes_nothing(float64, estimator):
    totals, groups = float64([1.0, 10.0, 2.0, 30.0]), ids(0, 1, 0, 1)
    shifted = totals + float64([5.0, -40.0, 5.0, -40.0])
    assert_close(advantages(estimator, shifted, groups), advantages(estimator, totals, groups), **TIGHT)


def test_centring_over_the_batch_keeps_a_number_per_prompt(float64):
    # negative control of the test above: r + f(x) shows in the batch mean, under whitening, and in the batch's unit
    totals, groups = float64([1.0, 2.0, 1.0, 2.0]), ids(0, 0, 1, 1)
    shifted = totals + float64([0.0, 0.0, 10.0, 10.0])
    batch = BanditAdvantage(baseline=BatchMean())
    # means 1.5 and 6.5
    assert_close(advantages(batch, totals, groups), float64([-0.5, 0.5, -0.5, 0.5]), **TIGHT)
    assert_close(advantages(batch, shifted, groups), float64([-5.5, -4.5, 4.5, 5.5]), **TIGHT)
    white = Whitened(estimator=BanditAdvantage())
    # 1 and 2 are no longer below and above: the sign of the second response turns
    assert advantages(white, totals, groups)[1] > 0.9
    assert advantages(white, shifted, groups)[1] < -0.8
    # one unit for all: std √(1/3) against √(101/3), though the distances are the same
    one_unit = GroupAdvantage(scale=BatchStd())
    ratio = advantages(one_unit, totals, groups)[1] / advantages(one_unit, shifted, groups)[1]
    assert_close(ratio, float64((math.sqrt(101 / 3) + 1e-4) / (math.sqrt(1 / 3) + 1e-4)), **TIGHT)
    assert ratio > 10


def test_whitened_leave_one_out_forgets_a_number_per_prompt(float64):
    # per-prompt centring first, whitening after: REINFORCE++ with a baseline
    totals, groups = float64([1.0, 2.0, 1.0, 4.0]), ids(0, 0, 1, 1)
    estimator = Whitened(estimator=BanditAdvantage(baseline=LeaveOneOut()))
    # A = ∓1, ∓3: variance 5
    unit = math.sqrt(5 + 1e-8)
    expected = float64([-1 / unit, 1 / unit, -3 / unit, 3 / unit])
    assert_close(advantages(estimator, totals, groups), expected, **TIGHT)
    shifted = totals + float64([0.0, 0.0, 10.0, 10.0])
    assert_close(advantages(estimator, shifted, groups), expected, **TIGHT)


# What is refused.


@pytest.mark.parametrize("groups", [[0], [0, 0, 1], [5, 9, 9, 9]])
@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_group_advantage_refuses_a_single_response(groups, scale):
    message = "`GroupAdvantage` needs at least 2 responses to each prompt: got a prompt with 1"
    with pytest.raises(ValueError, match=message):
        advantages(GroupAdvantage(scale=scale), torch.zeros(len(groups)), torch.tensor(groups))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_estimators_refuse_groups_of_another_length(estimator):
    with pytest.raises(ValueError, match=r"`groups` must have the shape of `x`, \(4,\): got \(2,\)"):
        advantages(estimator, torch.zeros(4), ids(0, 0))


@pytest.mark.parametrize("bad", [0.0, -1e-4, NAN, float("inf")])
@pytest.mark.parametrize("scale", [GroupStd, BatchStd])
def test_units_refuse_a_guard_that_is_none(scale, bad):
    with pytest.raises(ValueError, match="`guard` must be a number above 0: got"):
        scale(guard=bad)


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_a_reward_that_is_not_a_number_shows_in_its_group(float64, scale):
    totals, groups = float64([1.0, NAN, 2.0, 5.0]), ids(0, 0, 1, 1)
    assert advantages(GroupAdvantage(scale=scale), totals, groups)[:2].isnan().all()


@pytest.mark.parametrize("scale", [GroupStd(), NoScale()], ids=repr)
def test_a_reward_that_is_not_a_number_stays_in_its_group(float64, scale):
    totals, groups = float64([1.0, NAN, 2.0, 5.0]), ids(0, 0, 1, 1)
    clean = advantages(GroupAdvantage(scale=scale), float64([1.0, 9.0, 2.0, 5.0]), groups)
    assert torch.equal(advantages(GroupAdvantage(scale=scale), totals, groups)[2:], clean[2:])


def test_group_pieces_are_abstract():
    for cls in (GroupScale, AdvantageEstimator):
        with pytest.raises(TypeError):
            cls()
