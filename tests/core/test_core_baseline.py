from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    BanditAdvantage,
    Baseline,
    BatchMean,
    LearnedValue,
    LeaveOneOut,
    NoBaseline,
    RunningMean,
    Whitened,
    local,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
BASELINES = [NoBaseline(), BatchMean(), LeaveOneOut(), RunningMean(mean=0.2, weight=0.5), LearnedValue()]


def of(baseline, totals, *, values=None, groups=None, all_sum=local):
    values = torch.zeros_like(totals) if values is None else values
    groups = torch.zeros(len(totals), dtype=torch.int64) if groups is None else groups
    return baseline(totals, values, groups=groups, all_sum=all_sum)


def test_baselines_equal_hand_values(float64):
    totals, values = float64([1.0, 2.0, 6.0, 10.0, 20.0]), float64([0.5, -1.0, 3.0, 7.0, 8.0])
    groups = torch.tensor([4, 4, 4, -2, -2])

    def got(baseline):
        return of(baseline, totals, values=values, groups=groups)

    assert torch.equal(got(NoBaseline()), float64([0.0] * 5))
    assert_close(got(BatchMean()), float64([7.8] * 5), **TIGHT)  # 39/5
    # the others of the group: (2 + 6)/2, (1 + 6)/2, (1 + 2)/2; 20 and 10
    assert_close(got(LeaveOneOut()), float64([4.0, 3.5, 1.5, 20.0, 10.0]), **TIGHT)
    assert_close(got(RunningMean(mean=0.6, weight=0.2)), float64([3.0] * 5), **TIGHT)
    assert torch.equal(got(LearnedValue()), values)


def test_baselines_are_five_different_numbers(float64):
    totals, values = float64([1.0, 2.0, 6.0]), float64([9.0, 9.0, 9.0])
    assert len({tuple(of(b, totals, values=values).tolist()) for b in BASELINES}) == 5


@pytest.mark.parametrize(
    ("baseline", "needs_value", "needs_group"),
    [
        (NoBaseline(), False, False),
        (BatchMean(), False, False),
        (LeaveOneOut(), False, True),
        (RunningMean(), False, False),
        (LearnedValue(), True, False),
    ],
    ids=repr,
)
def test_needs_of_a_baseline_reach_every_estimator_around_it(baseline, needs_value, needs_group):
    bandit = BanditAdvantage(baseline=baseline)
    for thing in (baseline, bandit, Whitened(estimator=bandit), Whitened(estimator=Whitened(estimator=bandit))):
        assert thing.needs_value is needs_value
        assert thing.needs_group is needs_group


@pytest.mark.parametrize("baseline", BASELINES, ids=repr)
def test_a_baseline_looks_at_what_it_says_it_needs(float64, baseline):
    totals = float64([1.0, 2.0, 6.0, 10.0])
    values, groups = float64([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1])
    base = of(baseline, totals, values=values, groups=groups)
    moved = of(baseline, totals, values=values + 1, groups=groups)
    assert torch.equal(moved, base) is not baseline.needs_value
    moved = of(baseline, totals, values=values, groups=torch.tensor([0, 1, 1, 0]))
    assert torch.equal(moved, base) is not baseline.needs_group


# LeaveOneOut.

groups_of_rewards = st.lists(st.lists(st.floats(-50, 50), min_size=2, max_size=5), min_size=1, max_size=4)


def interleaved(rewards, random):
    """All rewards in a random order, with ids that are neither sorted nor contiguous."""
    rows = [(17 - 29 * g, r) for g, group in enumerate(rewards) for r in group]
    random.shuffle(rows)
    return torch.tensor([r for _, r in rows], dtype=torch.float64), torch.tensor([g for g, _ in rows])


@given(groups_of_rewards, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_leave_one_out_equals_a_naive_loop(rewards, random):
    totals, groups = interleaved(rewards, random)
    got = of(LeaveOneOut(), totals, groups=groups)
    for i in range(len(totals)):
        others = [float(totals[j]) for j in range(len(totals)) if j != i and groups[j] == groups[i]]
        assert abs(float(got[i]) - sum(others) / len(others)) <= 1e-9


@given(groups_of_rewards, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_leave_one_out_advantages_sum_to_zero_and_are_stretched_centered_rewards(rewards, random):
    # Σ_i A_i = 0 per group; A = k/(k − 1)·(R − mean)
    totals, groups = interleaved(rewards, random)
    advantages = totals - of(LeaveOneOut(), totals, groups=groups)
    for g in set(groups.tolist()):
        own, k = totals[groups == g].tolist(), int((groups == g).sum())
        assert abs(sum(advantages[groups == g].tolist())) <= 1e-9
        for a, r in zip(advantages[groups == g].tolist(), own, strict=True):
            assert abs(a - k / (k - 1) * (r - sum(own) / k)) <= 1e-9


def test_leave_one_out_of_equal_rewards_is_their_reward():
    # 1e-7: one rounding of a sum near 0.7 in float32 is 6e-8
    totals = torch.full((7,), 0.1)
    assert_close(of(LeaveOneOut(), totals), totals, rtol=0, atol=1e-7)


def test_leave_one_out_of_two_ranks_equals_one_where_groups_stay_whole(as_ranks, float64):
    ranks = [(float64([1.0, 5.0]), torch.tensor([3, 3])), (float64([2.0, 4.0, 9.0]), torch.tensor([8, 8, 8]))]
    got = as_ranks(lambda r, all_sum: of(LeaveOneOut(), ranks[r][0], groups=ranks[r][1], all_sum=all_sum))
    assert_close(torch.cat(got), float64([5.0, 1.0, 6.5, 5.5, 3.0]), **TIGHT)


@pytest.mark.parametrize("groups", [[0], [0, 0, 1], [5, 9, 9, 9]])
def test_leave_one_out_refuses_a_single_response(groups):
    message = "`LeaveOneOut` needs at least 2 responses to each prompt: got a prompt with 1"
    with pytest.raises(ValueError, match=message):
        of(LeaveOneOut(), torch.zeros(len(groups)), groups=torch.tensor(groups))


# BatchMean.


def test_batch_mean_of_two_ranks_counts_responses_and_not_ranks(as_ranks, float64):
    # (8 + 0 + 2 + 2)/4 = 3 on either rank; negative control: the mean of the ranks' means is (8 + 4/3)/2 = 4.67
    ranks = [float64([8.0]), float64([0.0, 2.0, 2.0])]
    got = as_ranks(lambda r, all_sum: of(BatchMean(), ranks[r], all_sum=all_sum))
    assert_close(torch.cat(got), float64([3.0] * 4), **TIGHT)
    apart = [float(of(BatchMean(), x)[0]) for x in ranks]
    assert abs(sum(apart) / 2 - 3) > 1.6


# RunningMean.


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_running_mean_equals_its_closed_form(float64, decay):
    # m_n = (1 − d)·Σ_i d^(n−i)·x_i and 1 − dⁿ, so b = Σ_i d^(n−i)·x_i / Σ_i d^(n−i): a weighted mean of what was seen
    seen = [4.0, -2.0, 7.0, 1.0, 3.0]
    baseline = RunningMean(decay=decay)
    for n in range(1, 6):
        baseline = baseline.adapted(seen[n - 1])
        weights = [decay ** (n - i) for i in range(1, n + 1)]
        expected = sum(w * x for w, x in zip(weights, seen[:n], strict=True)) / sum(weights)
        assert_close(of(baseline, float64([100.0, -3.0])), float64([expected] * 2), **TIGHT)
        assert abs(baseline.weight - (1 - decay**n)) <= 1e-12
        assert abs(baseline.mean - expected * (1 - decay**n)) <= 1e-9


def test_running_mean_equals_hand_values(float64):
    # d = ½, 4 then 1: m = 2, weight ½, b = 4; m = 1.5, weight ¾, b = 2
    first = RunningMean(decay=0.5).adapted(4.0)
    assert (first.mean, first.weight) == (2.0, 0.5)
    assert torch.equal(of(first, float64([9.0])), float64([4.0]))
    second = first.adapted(1.0)
    assert (second.mean, second.weight) == (1.5, 0.75)
    assert torch.equal(of(second, float64([9.0])), float64([2.0]))
    # negative control: without the correction the baseline would lag at 1.5
    assert second.mean != float(of(second, float64([9.0])))


def test_running_mean_is_zero_before_the_first_rollout(float64):
    assert torch.equal(of(RunningMean(), float64([9.0, -1.0])), float64([0.0, 0.0]))


def test_running_mean_does_not_look_at_the_rollout_it_judges(float64):
    # a mean that knew the rewards would bias the gradient
    baseline = RunningMean(mean=1.0, weight=0.5)
    for totals in ([9.0, -1.0], [NAN, 1e9]):
        assert torch.equal(of(baseline, float64(totals)), float64([2.0, 2.0]))


def test_running_mean_of_a_constant_is_the_constant(float64):
    baseline = RunningMean(decay=0.97)
    for _ in range(50):
        baseline = baseline.adapted(-3.0)
        assert_close(of(baseline, float64([0.0])), float64([-3.0]), **TIGHT)


def test_every_number_of_running_mean_moves_it(float64):
    def after(**numbers):
        return float(of(RunningMean(**numbers).adapted(10.0), float64([0.0])))

    # d = 0.9, m = 1, weight ½: (0.9 + 1)/(0.45 + 0.1) = 1.9/0.55
    assert abs(after(mean=1.0, weight=0.5) - 1.9 / 0.55) <= 1e-9
    assert abs(after(decay=0.5, mean=1.0, weight=0.5) - 5.5 / 0.75) <= 1e-9
    assert abs(after(mean=2.0, weight=0.5) - 2.8 / 0.55) <= 1e-9
    assert abs(after(mean=1.0, weight=1.0) - 1.9) <= 1e-9
    assert RunningMean() == RunningMean(decay=0.9, mean=0.0, weight=0.0)


def test_running_mean_stays_and_its_successor_moves():
    baseline = RunningMean(decay=0.5, mean=1.0, weight=0.5)
    successor = baseline.adapted(7.0)
    assert baseline == RunningMean(decay=0.5, mean=1.0, weight=0.5)
    assert successor == RunningMean(decay=0.5, mean=4.0, weight=0.75)
    with pytest.raises(FrozenInstanceError):
        baseline.mean = 3.0


@pytest.mark.parametrize("baseline", [NoBaseline(), BatchMean(), LeaveOneOut(), LearnedValue()], ids=repr)
def test_other_baselines_do_not_adapt(baseline):
    assert baseline.adapted(7.0) is baseline
    assert baseline.state() == {}


def test_running_mean_adapts_inside_every_estimator_around_it():
    bandit = BanditAdvantage(baseline=RunningMean(decay=0.5))
    assert bandit.adapted(4.0) == BanditAdvantage(baseline=RunningMean(decay=0.5, mean=2.0, weight=0.5))
    outer = Whitened(estimator=Whitened(estimator=bandit))
    inner = outer.adapted(4.0).estimator.estimator.baseline
    assert inner == RunningMean(decay=0.5, mean=2.0, weight=0.5)
    assert bandit.baseline == RunningMean(decay=0.5)


def test_running_mean_refuses_numbers_out_of_range():
    for bad in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\]: got"):
            RunningMean(decay=bad)
        with pytest.raises(ValueError, match=r"`weight` must lie in \[0, 1\]: got"):
            RunningMean(weight=bad)
    with pytest.raises(ValueError, match="`decay` must be below 1: with 1 the mean would never move"):
        RunningMean(decay=1.0)
    with pytest.raises(ValueError, match=r"`mean` without `weight` counts for nothing: got 2.0; set `weight` in"):
        RunningMean(mean=2.0)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_running_mean_refuses_a_mean_that_is_not_finite(bad):
    # AdaptiveKL and KLPen raise at once
    with pytest.raises(ValueError, match="mean"):
        RunningMean().adapted(bad)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_running_mean_refuses_to_start_from_a_mean_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="`mean`"):
        RunningMean(mean=bad, weight=0.5)


def test_baseline_is_abstract():
    with pytest.raises(TypeError):
        Baseline()
