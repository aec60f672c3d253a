import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import Reduction, SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
REDUCTIONS = [TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean(), SeqMeanTokenSumNorm(length=7)]
LENGTHS = st.lists(st.integers(0, 6), min_size=2, max_size=8).filter(any)


def naive(reduction, rows):
    """The loss of a step whose responses have these per-token losses; an empty response is none."""
    rows = [row for row in rows if row]
    tokens = sum(len(row) for row in rows)
    return {
        TokenMean: lambda: math.fsum(map(math.fsum, rows)) / tokens,
        SeqMeanTokenSum: lambda: math.fsum(map(math.fsum, rows)) / len(rows),
        SeqMeanTokenMean: lambda: math.fsum(math.fsum(row) / len(row) for row in rows) / len(rows),
        SeqMeanTokenSumNorm: lambda: math.fsum(map(math.fsum, rows)) / len(rows) / 7,
    }[type(reduction)]()


def random_step(lengths, seed):
    losses = torch.randn(len(lengths), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    rows = [[float(losses[i, t]) for t in range(length)] for i, length in enumerate(lengths)]
    return torch.where(mask, losses, NAN), mask, rows


@pytest.mark.parametrize(
    ("reduction", "total", "count"),
    [
        # Σ = 1 + 2 + 3 + 4 = 10 over 4 tokens, of 2 responses that have any; means 2 and 4; 10/8 with length 8
        (TokenMean(), 10.0, 4),
        (SeqMeanTokenSum(), 10.0, 2),
        (SeqMeanTokenMean(), 6.0, 2),
        (SeqMeanTokenSumNorm(length=8), 1.25, 2),
    ],
    ids=repr,
)
def test_reductions_equal_hand_values(float64, reduction, total, count):
    losses = float64([[1.0, 2.0, 3.0], [4.0, NAN, 5.0], [NAN, 6.0, 7.0]])
    assert_close(reduction.total(losses, MASK), float64(total), **TIGHT)
    assert reduction.count(MASK) == count
    assert reduction.count(MASK).dtype == torch.int64
    assert reduction.count(MASK).shape == reduction.total(losses, MASK).shape == ()


@pytest.mark.parametrize(
    ("reduction", "long", "short"),
    [
        # two responses, of 3 tokens and of 1: what a token weighs in each
        (TokenMean(), 1 / 4, 1 / 4),
        (SeqMeanTokenSum(), 1 / 2, 1 / 2),
        (SeqMeanTokenMean(), 1 / 6, 1 / 2),
        (SeqMeanTokenSumNorm(length=8), 1 / 16, 1 / 16),
    ],
    ids=repr,
)
def test_reduction_weighs_tokens_as_stated_and_masked_slots_not_at_all(float64, reduction, long, short):
    losses = float64([[1.0, 2.0, 3.0], [4.0, NAN, 5.0], [NAN, 6.0, 7.0]], requires_grad=True)
    (reduction.total(losses, MASK) / reduction.count(MASK)).backward()
    assert_close(losses.grad, float64([[long] * 3, [short, 0.0, 0.0], [0.0] * 3]), **TIGHT)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_microbatches_with_the_steps_count_equal_the_whole_batch(lengths, size, seed):
    losses, mask, rows = random_step(lengths, seed)
    for reduction in REDUCTIONS:
        starts = range(0, len(lengths), size)
        n = sum(reduction.count(mask[i : i + size]) for i in starts)
        parts = sum(reduction.total(losses[i : i + size], mask[i : i + size]) / n for i in starts)
        assert n == (sum(lengths) if isinstance(reduction, TokenMean) else sum(length > 0 for length in lengths))
        assert abs(float(parts) - naive(reduction, rows)) <= 1e-9


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=repr)
def test_two_ranks_with_the_steps_count_equal_one(as_ranks, reduction):
    losses, mask, rows = random_step([6, 1, 3, 0, 2, 5, 4], 3)
    parts = [slice(0, 3), slice(3, 7)]

    def work(rank, all_sum):
        mine = parts[rank]
        return float(all_sum(reduction.total(losses[mine], mask[mine])) / all_sum(reduction.count(mask[mine])))

    for got in as_ranks(work):
        assert abs(got - naive(reduction, rows)) <= 1e-9


@pytest.mark.parametrize(
    ("reduction", "whole", "micro"),
    [
        # by token: (1 + 1 + 1 + 5 + 9)/5 = 3.4, by micro ((1 + 1 + 1 + 5)/4 + 9)/2 = 5.5
        (TokenMean(), 3.4, 5.5),
        # by response: (3 + 5 + 9)/3, by micro ((3 + 5)/2 + 9)/2
        (SeqMeanTokenSum(), 17 / 3, 6.5),
        # (1 + 5 + 9)/3, ((1 + 5)/2 + 9)/2
        (SeqMeanTokenMean(), 5.0, 6.0),
        (SeqMeanTokenSumNorm(length=2), 17 / 6, 3.25),
    ],
    ids=repr,
)
def test_the_mean_of_microbatch_means_is_another_number(float64, reduction, whole, micro):
    # negative control of the two tests above
    losses, mask = float64([[1.0, 1.0, 1.0], [5.0, NAN, NAN], [9.0, NAN, NAN]]), MASK[[0, 1, 1]]
    means = [reduction.total(losses[i], mask[i]) / reduction.count(mask[i]) for i in (slice(0, 3), [0, 1], [2])]
    assert abs(float(means[0]) - whole) <= 1e-9
    assert abs(float(means[1] + means[2]) / 2 - micro) <= 1e-9


@given(LENGTHS, st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_padding_and_the_order_of_rows_change_nothing(lengths, seed):
    losses, mask, _ = random_step(lengths, seed)
    wide = torch.cat([losses, torch.full((len(lengths), 2), NAN, dtype=torch.float64)], 1)
    more = torch.cat([mask, torch.zeros(len(lengths), 2, dtype=torch.bool)], 1)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    for reduction in REDUCTIONS:
        for x, counts in ((wide, more), (losses[order], mask[order])):
            assert_close(reduction.total(x, counts), reduction.total(losses, mask), **TIGHT)
            assert reduction.count(counts) == reduction.count(mask)


@given(LENGTHS, st.integers(1, 50), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_constant_length_is_the_sequence_mean_over_the_length(lengths, length, seed):
    # Dr. GRPO's is SeqMeanTokenSum / L, whatever the responses' own lengths; so is TokenMean where all are L long
    losses, mask, rows = random_step(lengths, seed)
    constant = SeqMeanTokenSumNorm(length=length)
    got = float(constant.total(losses, mask) / constant.count(mask))
    assert abs(got - naive(SeqMeanTokenSum(), rows) / length) <= 1e-9
    full, everything, rows = random_step([6, 6], seed)
    got = SeqMeanTokenSumNorm(length=6).total(full, everything) / SeqMeanTokenSumNorm(length=6).count(everything)
    assert abs(float(got) - naive(TokenMean(), rows)) <= 1e-9
    assert abs(float(got) - naive(SeqMeanTokenMean(), rows)) <= 1e-9


def test_at_sequence_level_all_means_agree(float64):
    losses, mask = float64([[1.0], [3.0], [8.0]]), torch.tensor([[True], [True], [False]])
    for reduction in REDUCTIONS[:3]:
        assert reduction.total(losses, mask) / reduction.count(mask) == 2.0


def test_length_moves_the_loss(float64):
    for length in (1, 4, 128):
        constant = SeqMeanTokenSumNorm(length=length)
        assert_close(constant.total(float64([[1.0, 2.0, 5.0]] * 3), MASK), float64(9.0 / length), **TIGHT)
    assert SeqMeanTokenSumNorm().for_length(128) == SeqMeanTokenSumNorm(length=128)
    assert SeqMeanTokenSumNorm(length=7).for_length(128).length == 7


def test_reductions_refuse_bad_numbers_and_shapes(float64):
    for bad in (0, -3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`length` must be a number above 0: got"):
            SeqMeanTokenSumNorm(length=bad)
    for reduction in REDUCTIONS:
        with pytest.raises(ValueError, match=r"`mask` must have the shape of `x`: got \(3, 3\) for \(3, 1\)"):
            reduction.total(float64([[1.0], [2.0], [3.0]]), MASK)


def test_reduction_is_abstract():
    with pytest.raises(TypeError):
        Reduction()
