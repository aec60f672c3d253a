import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import SequenceMean, TokenMean

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_reductions_equal_hand_values(float64):
    losses = float64([[1.0, 2.0, 3.0], [4.0, NAN, 5.0], [NAN, 6.0, 7.0]])
    # Σ = 1 + 2 + 3 + 4 = 10 over 4 tokens, of 2 responses that have any
    for reduction, count in ((TokenMean(), 4), (SequenceMean(), 2)):
        assert reduction.total(losses, MASK) == 10
        assert reduction.count(MASK) == count
        assert reduction.count(MASK).dtype == torch.int64


@pytest.mark.parametrize(
    ("reduction", "expected"), [(TokenMean(), [[0.25] * 3, [0.25, 0.0]]), (SequenceMean(), [[0.5] * 3, [0.5, 0.0]])]
)
def test_reduction_weighs_tokens_or_responses_alike(float64, reduction, expected):
    # a token of 4 weighs 1/4; with two responses every token weighs 1/2, so a response weighs as its *sum*
    losses = float64([[1.0, 2.0, 3.0], [4.0, NAN, 5.0], [NAN, 6.0, 7.0]], requires_grad=True)
    (reduction.total(losses, MASK) / reduction.count(MASK)).backward()
    assert_close(losses.grad[0], float64(expected[0]), **TIGHT)
    assert_close(losses.grad[1, :2], float64(expected[1]), **TIGHT)
    assert losses.grad[2].eq(0).all()


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(1, 4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_microbatches_with_the_steps_count_equal_the_whole_batch(lengths, size, seed):
    losses = torch.randn(len(lengths), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(6) < torch.tensor(lengths).unsqueeze(1)
    flat = [float(losses[i, t]) for i, length in enumerate(lengths) for t in range(length)]
    for reduction, count in ((TokenMean(), len(flat)), (SequenceMean(), len(lengths))):
        starts = range(0, len(lengths), size)
        n = sum(reduction.count(mask[i : i + size]) for i in starts)
        parts = sum(reduction.total(losses[i : i + size], mask[i : i + size]) / n for i in starts)
        assert n == count
        assert abs(float(parts) - sum(flat) / count) <= 1e-9


def test_the_mean_of_microbatch_means_is_another_number(float64):
    # negative control: whole (1 + 1 + 1 + 5)/4 = 2; per micro (1 + 5)/2 = 3
    losses, mask = float64([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), MASK[:2]
    mean = TokenMean()
    whole = mean.total(losses, mask) / mean.count(mask)
    micro = sum(mean.total(losses[i : i + 1], mask[i : i + 1]) / mean.count(mask[i : i + 1]) for i in range(2)) / 2
    assert (float(whole), float(micro)) == (2.0, 3.0)


def test_at_sequence_level_both_reductions_agree(float64):
    losses, mask = float64([[1.0], [3.0], [8.0]]), torch.tensor([[True], [True], [False]])
    for reduction in (TokenMean(), SequenceMean()):
        assert reduction.total(losses, mask) / reduction.count(mask) == 2.0
