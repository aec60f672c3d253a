import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import local, masked_mean, masked_sum, masked_variance, whiten

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
MASK = torch.tensor([[True, True], [False, True]])


def test_masked_statistics_equal_hand_values(float64):
    x = float64([[1.0, 2.0], [3.0, 4.0]])
    # entries 1, 2, 4: Σ = 7, mean = 7/3, var = (1 + 4 + 16)/3 − 49/9 = 14/9 (the unbiased one would be 7/3)
    assert_close(masked_sum(x, MASK), float64(7.0), **TIGHT)
    assert_close(masked_mean(x, MASK), float64(7 / 3), **TIGHT)
    assert_close(masked_variance(x, MASK), float64(14 / 9), **TIGHT)
    # negative control: with the masked 3 counted, 10, 10/4 and 30/4 − 25/4
    everything = torch.ones_like(MASK)
    assert masked_sum(x, everything) == 10
    assert masked_mean(x, everything) == 2.5
    assert masked_variance(x, everything) == 1.25


@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e300])
def test_masked_slots_have_no_influence_whatever_they_hold(float64, junk):
    x = float64([[1.0, 2.0], [junk, 4.0]])
    assert_close(masked_sum(x, MASK), float64(7.0), **TIGHT)
    assert_close(masked_mean(x, MASK), float64(7 / 3), **TIGHT)
    assert_close(masked_variance(x, MASK), float64(14 / 9), **TIGHT)
    assert_close(whiten(x, MASK), whiten(float64([[1.0, 2.0], [3.0, 4.0]]), MASK), **TIGHT)


def test_masked_statistics_see_what_counts(float64):
    # negative control of the test above: a NaN that counts must show
    x = float64([[1.0, NAN], [3.0, 4.0]])
    for statistic in (masked_sum, masked_mean, masked_variance):
        assert statistic(x, MASK).isnan()


def test_masked_sum_gradient_is_the_mask(float64):
    x = float64([[1.0, 2.0], [NAN, 4.0]], requires_grad=True)
    masked_sum(x, MASK).backward()
    assert_close(x.grad, MASK.double(), **TIGHT)


def test_masked_mean_is_zero_where_nothing_counts(float64):
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    x = float64([[NAN, 2.0], [3.0, 4.0]])
    assert masked_sum(x, nothing) == 0
    assert masked_mean(x, nothing) == 0
    assert masked_variance(x, nothing) == 0
    assert torch.equal(whiten(x, nothing), torch.zeros_like(x))


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_variance, whiten])
def test_masked_statistics_refuse_another_shape(statistic):
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `x`: got \(2, 1\) for \(2, 3\)"):
        statistic(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


def test_local_is_the_identity(float64):
    x = float64([1.0, 2.0])
    assert local(x) is x


def test_whiten_equals_hand_values(float64):
    x = float64([[1.0, 2.0], [3.0, 4.0]])
    # entries 1, 2, 4: mean 7/3, var 14/9; (1 − 7/3)/√(14/9) = −4/√14, (2 − 7/3) → −1/√14, (4 − 7/3) → 5/√14
    root = math.sqrt(14)
    shifted = float64([[-4 / root, -1 / root], [0.0, 5 / root]])
    # 1e-8 beside 14/9 moves the ninth digit
    assert_close(whiten(x, MASK), shifted, rtol=0, atol=1e-8)


def test_whiten_adds_epsilon_to_the_variance(float64):
    # entries 0, 2e-4: mean 1e-4, var 1e-8: ±1/√2 (ε added to the deviation would give ±1)
    x, mask = float64([0.0, 2e-4]), torch.tensor([True, True])
    assert_close(whiten(x, mask), float64([-math.sqrt(0.5), math.sqrt(0.5)]), **TIGHT)


def test_whiten_of_equal_entries_is_zero_and_not_nan(float64):
    x, mask = float64([0.5, 0.5, 9.0]), torch.tensor([True, True, False])
    assert torch.equal(whiten(x, mask), torch.zeros_like(x))


@st.composite
def ragged(draw):
    lengths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    seed = draw(st.integers(0, 2**31))
    mask = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    offset = draw(st.floats(-100, 100))
    return torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + offset, mask


@given(ragged())
@settings(deadline=None, max_examples=50)
def test_whitened_entries_have_mean_zero_and_variance_one(case):
    x, mask = case
    inside = [
        v for row, keep in zip(x.tolist(), mask.tolist(), strict=True) for v, k in zip(row, keep, strict=True) if k
    ]
    mean = sum(inside) / len(inside)
    variance = sum((v - mean) ** 2 for v in inside) / len(inside)
    white = whiten(x.masked_fill(~mask, NAN), mask)
    assert white[~mask].eq(0).all()
    assert abs(float(white[mask].mean())) <= 1e-9
    assert abs(float(white[mask].var(unbiased=False)) - variance / (variance + 1e-8)) <= 1e-9


def test_whiten_without_mask_is_another_number(float64):
    # negative control of the property: whitening over padding too leaves the entries that count off centre
    x = float64([[1.0, 2.0], [100.0, 4.0]])
    everything = torch.ones_like(MASK)
    assert abs(float(whiten(x, everything)[MASK].mean())) > 0.1


def test_statistics_of_two_ranks_equal_one(as_ranks, float64):
    # unequal counts: rank 0 holds {1, 2}, rank 1 holds {4}, one masked entry each
    x = float64([[1.0, 2.0, NAN], [4.0, 7.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for statistic, expected in ((masked_mean, 7 / 3), (masked_variance, 14 / 9)):
        got = as_ranks(lambda rank, all_sum, f=statistic: f(x[rank], mask[rank], all_sum))
        assert_close(torch.stack(got), float64([expected, expected]), **TIGHT)
    halves = as_ranks(lambda r, all_sum: whiten(x[r], mask[r], all_sum=all_sum))
    assert_close(torch.stack(halves), whiten(x, mask), **TIGHT)
    # negative control: the mean of the ranks' means is (1.5 + 4)/2 = 2.75, and whitening apart differs
    apart = torch.stack([masked_mean(x[r], mask[r]) for r in range(2)])
    assert abs(float(apart.mean()) - 7 / 3) > 0.4
    assert not torch.allclose(torch.stack([whiten(x[r], mask[r]) for r in range(2)]), whiten(x, mask), atol=0.1)


def test_a_rank_without_entries_follows_the_others(as_ranks, float64):
    x = float64([[1.0, 3.0], [5.0, 5.0]])
    mask = torch.tensor([[True, True], [False, False]])
    got = as_ranks(lambda rank, all_sum: masked_mean(x[rank], mask[rank], all_sum))
    assert_close(torch.stack(got), float64([2.0, 2.0]), **TIGHT)
