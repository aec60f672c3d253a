import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import group_mean, group_size, group_std, group_sum
from lightning_rlhf.core.groups import group_first

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
GROUPS = torch.tensor([7, -3, 7, 0, -3, 7])
OF_NUMBERS = [group_sum, group_mean, group_std]


def members(x, groups, i):
    return [v for v, g in zip(x, groups, strict=True) if g == groups[i]]


def naive_std(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))


# ids of any sign and size, with gaps between them
grouped = st.lists(
    st.tuples(st.floats(-100, 100), st.sampled_from([-(2**62), -3, 0, 1, 5, 2**40])), min_size=1, max_size=9
)


@given(grouped)
@settings(deadline=None, max_examples=30)
def test_group_statistics_equal_naive_loops(rows):
    numbers, ids = [v for v, _ in rows], [g for _, g in rows]
    x, groups = torch.tensor(numbers, dtype=torch.float64), torch.tensor(ids)
    for i in range(len(rows)):
        own = members(numbers, ids, i)
        assert abs(float(group_sum(x, groups)[i]) - sum(own)) <= 1e-9
        assert int(group_size(groups)[i]) == len(own)
        assert abs(float(group_mean(x, groups)[i]) - sum(own) / len(own)) <= 1e-9
        assert float(group_first(x, groups)[i]) == own[0]
        # a naive mean of equal numbers may round, and its squares would then be 1e-28: the exact answer is 0
        assert abs(float(group_std(x, groups)[i]) - naive_std(own)) <= 1e-9


@given(grouped, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_group_statistics_follow_ids_and_not_positions(rows, random):
    x = torch.tensor([v for v, _ in rows], dtype=torch.float64)
    groups = torch.tensor([g for _, g in rows])
    order = list(range(len(rows)))
    random.shuffle(order)
    renamed = torch.tensor([{-(2**62): 4, -3: -9, 0: 2**50, 1: 0, 5: 17, 2**40: -1}[g] for _, g in rows])
    for statistic in OF_NUMBERS:
        assert_close(statistic(x[order], groups[order]), statistic(x, groups)[order], **TIGHT)
        assert_close(statistic(x, renamed), statistic(x, groups), **TIGHT)
    assert torch.equal(group_size(groups[order]), group_size(groups)[order])
    assert torch.equal(group_size(renamed), group_size(groups))


def test_group_statistics_equal_hand_values(float64):
    x = float64([1.0, 10.0, 2.0, 5.0, 30.0, 6.0])
    # group 7 holds 1, 2, 6 (Σ 9, mean 3, squares 4 + 1 + 9 = 14, std √7), group −3 10 and 30 (std √200), group 0 5
    assert_close(group_sum(x, GROUPS), float64([9.0, 40.0, 9.0, 5.0, 40.0, 9.0]), **TIGHT)
    assert_close(group_mean(x, GROUPS), float64([3.0, 20.0, 3.0, 5.0, 20.0, 3.0]), **TIGHT)
    assert torch.equal(group_size(GROUPS), torch.tensor([3, 2, 3, 1, 2, 3]))
    seven, two = math.sqrt(7), math.sqrt(200)
    assert_close(group_std(x, GROUPS), float64([seven, two, seven, 0.0, two, seven]), **TIGHT)
    # negative controls: neighbors taken for a group, and the biased deviation √(14/3)
    pairs = torch.tensor([0, 0, 0, 1, 1, 1])
    assert abs(float(group_sum(x, pairs)[0]) - 9) == 4
    assert abs(math.sqrt(14 / 3) - seven) > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 33])
def test_group_std_of_equal_numbers_is_exactly_zero(dtype, k):
    # 0.1 is no binary fraction: the mean of k copies need not be the number itself
    x = torch.cat([torch.full((k,), 0.1, dtype=dtype), torch.arange(4).to(dtype)])
    groups = torch.tensor([1] * k + [2] * 4)
    assert torch.equal(group_std(x, groups)[:k], torch.zeros(k, dtype=dtype))
    assert group_std(x, groups)[k] > 1


def test_group_std_without_its_guard_would_round():
    # negative control of the test above: the mean of 7 float32 copies of 0.1, or of 3 in float64, is another number
    for k, dtype in ((7, torch.float32), (3, torch.float64)):
        x = torch.full((k,), 0.1, dtype=dtype)
        assert (x - x.sum() / k).abs().max() > 0


def test_group_std_keeps_differences_of_one_ulp(float64):
    # the two largest numbers below 1 differ by 2⁻⁵³: a spread of 2⁻⁵³/√2, and not 0
    x = float64([1 - 2**-53, 1 - 2**-52])
    assert float(group_std(x, torch.tensor([0, 0]))[0]) == pytest.approx(2**-53 / math.sqrt(2), rel=0.5)  # rounding
    assert float(group_std(x, torch.tensor([0, 0]))[0]) > 0


@pytest.mark.parametrize("junk", [NAN, math.inf, 1e300])
@pytest.mark.parametrize("statistic", OF_NUMBERS)
def test_groups_do_not_touch_each_other(float64, statistic, junk):
    x = float64([1.0, junk, 2.0, 5.0, 30.0, 6.0])
    clean = statistic(float64([1.0, 10.0, 2.0, 5.0, 30.0, 6.0]), GROUPS)
    others = GROUPS != -3
    assert torch.equal(statistic(x, GROUPS)[others], clean[others])
    # negative control: it shows in its own group
    assert not torch.equal(statistic(x, GROUPS)[~others], clean[~others])


def test_one_group_is_everything_and_one_each_is_nothing_shared(float64):
    x = float64([1.0, 2.0, 6.0])
    together, alone = torch.zeros(3, dtype=torch.int64), torch.tensor([4, -4, 9])
    assert torch.equal(group_sum(x, together), float64([9.0] * 3))
    assert torch.equal(group_sum(x, alone), x)
    assert torch.equal(group_mean(x, alone), x)
    assert torch.equal(group_std(x, alone), torch.zeros_like(x))
    assert torch.equal(group_size(alone), torch.ones(3, dtype=torch.int64))


def test_group_size_counts_in_integers():
    assert group_size(GROUPS).dtype == torch.int64


@pytest.mark.parametrize("statistic", [group_sum, group_mean, group_std])
@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)])
def test_group_statistics_refuse_another_shape(statistic, shape):
    expected = rf"`groups` must have the shape of `x`, \(3,\): got \({', '.join(map(str, shape))},?\)"
    with pytest.raises(ValueError, match=expected):
        statistic(torch.zeros(3), torch.zeros(shape, dtype=torch.int64))
