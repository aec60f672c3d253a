import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import RankingLoss, preferred_pairs, score_margins

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}


def naive(scores, rank):
    """eq. 1 of one prompt by a pair loop in Python floats; the loss and its gradient."""
    pairs = [
        (i, j)
        for i in range(len(rank))
        for j in range(len(rank))
        if rank[i] >= 0 and rank[j] >= 0 and rank[i] < rank[j]
    ]
    loss, gradient = 0.0, [0.0] * len(rank)
    for i, j in pairs:
        margin = scores[i] - scores[j]
        loss += math.log1p(math.exp(-margin)) / len(pairs)
        push = 1 / (1 + math.exp(margin)) / len(pairs)  # −d/d margin of −log σ(margin)
        gradient[i] -= push
        gradient[j] += push
    return loss, gradient


@st.composite
def rankings(draw):
    """Ragged prompts of up to 6 responses with ties and absent ones, and their scores."""
    rows, k = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rank = [draw(st.lists(st.integers(-1, 3), min_size=k, max_size=k)) for _ in range(rows)]
    scores = [draw(st.lists(st.floats(-20, 20), min_size=k, max_size=k)) for _ in range(rows)]
    return scores, rank


@given(rankings())
@settings(deadline=None, max_examples=50)
def test_ranking_loss_equals_a_naive_pair_loop_with_its_gradient(case):
    scores, rank = case
    ranks = torch.tensor(rank)
    x = torch.tensor(scores, dtype=torch.float64).masked_fill(ranks < 0, NAN).requires_grad_()
    loss = RankingLoss()(x, ranks)
    loss.sum().backward()
    for b, (row, order) in enumerate(zip(scores, rank, strict=True)):
        expected, gradient = naive(row, order)
        assert abs(float(loss[b].detach()) - expected) <= 1e-9
        assert_close(x.grad[b], torch.tensor(gradient, dtype=torch.float64), **TIGHT)
        assert abs(float(x.grad[b].sum())) <= 1e-9


def test_ranking_loss_equals_hand_value(float64):
    # ranks 0, 1, 2 with scores 3, 1, 2: margins 2, 1 and −1 (wrong way round)
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 3
    assert_close(RankingLoss()(float64([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]])), float64([expected]), **TIGHT)
    # negative control: the opposite ranks give another loss, log(1 + e^margin)
    opposite = (math.log1p(math.exp(2)) + math.log1p(math.exp(1)) + math.log1p(math.exp(-1))) / 3
    assert_close(RankingLoss()(float64([[3.0, 1.0, 2.0]]), torch.tensor([[2, 1, 0]])), float64([opposite]), **TIGHT)
    assert abs(opposite - expected) > 0.5


def test_two_responses_are_bradley_terry(float64):
    # −log σ(r_w − r_l), with gradient −σ(−(r_w − r_l)) on the winner
    scores = float64([[0.3, -0.5]], requires_grad=True)
    loss = RankingLoss()(scores, torch.tensor([[0, 1]]))
    loss.sum().backward()
    assert_close(loss.detach(), float64([-math.log(1 / (1 + math.exp(-0.8)))]), **TIGHT)
    push = 1 / (1 + math.exp(0.8))
    assert_close(scores.grad, float64([[-push, push]]), **TIGHT)


def test_equal_scores_cost_log_two(float64):
    scores = float64([[1.5] * 4, [0.0] * 4])
    assert_close(
        RankingLoss()(scores, torch.tensor([[0, 1, 2, 3], [0, 1, 1, -1]])), float64([math.log(2)] * 2), **TIGHT
    )


def test_every_prompt_weighs_the_same_whatever_its_k(float64):
    # the mean over pairs, not the sum: 9 responses of equal score cost as much as 2
    nine, two = torch.arange(9).unsqueeze(0), torch.tensor([[0, 1]])
    zeros = float64([[0.0] * 9])
    assert_close(RankingLoss()(zeros, nine), RankingLoss()(zeros[:, :2], two), **TIGHT)


def test_ties_are_dropped_from_sum_and_count(float64):
    # ranks 0, 1, 1: pairs (0, 1) and (0, 2), margins 1 and 3, divided by 2 and not by C(3, 2) = 3
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2
    assert_close(RankingLoss()(float64([[2.0, 1.0, -1.0]]), torch.tensor([[0, 1, 1]])), float64([expected]), **TIGHT)


def test_a_prompt_without_pair_is_zero_with_zero_gradient(float64):
    scores = float64([[1.0, 2.0], [1.0, NAN], [NAN, NAN]], requires_grad=True)
    loss = RankingLoss()(scores, torch.tensor([[0, 0], [0, -1], [-1, -1]]))
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_absent_responses_have_no_influence(float64):
    scores, rank = float64([[0.5, -1.0]]), torch.tensor([[1, 0]])
    for junk in (NAN, math.inf, -math.inf, 1e300):
        padded = torch.cat([scores, float64([[junk]])], 1)
        assert torch.equal(RankingLoss()(padded, torch.tensor([[1, 0, -1]])), RankingLoss()(scores, rank))
    # negative control: a response that is present shows
    assert not torch.equal(
        RankingLoss()(float64([[0.5, -1.0, 7.0]]), torch.tensor([[1, 0, 2]])), RankingLoss()(scores, rank)
    )


def test_ranking_loss_is_unmoved_by_permutation_shift_and_rank_labels(float64):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    rank = torch.tensor([[0, 3, 1, 1, 2], [2, 0, -1, 1, 0]])
    loss = RankingLoss()(scores, rank)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_close(RankingLoss()(scores[:, order], rank[:, order]), loss, **TIGHT)
    assert_close(RankingLoss()(scores + float64([[100.0], [-7.0]]), rank), loss, **TIGHT)
    assert_close(RankingLoss()(scores, torch.where(rank > 0, rank * 10, rank)), loss, **TIGHT)
    # negative controls: scores without their ranks, and a scale, do move it
    assert (RankingLoss()(scores[:, order], rank) - loss).abs().max() > 0.01
    assert (RankingLoss()(2 * scores, rank) - loss).abs().max() > 0.01


def test_ranking_loss_is_finite_at_extreme_margins(float64):
    # −log σ(±1000) is 0 and 1000; exp(1000) overflows on the way if done naively
    scores = float64([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    loss = RankingLoss()(scores, torch.tensor([[0, 1], [0, 1]]))
    loss.sum().backward()
    assert_close(loss.detach(), float64([0.0, 1000.0]), **TIGHT)
    assert_close(scores.grad, float64([[0.0, 0.0], [-1.0, 1.0]]), **TIGHT)


def test_preferred_pairs_equal_hand_values():
    # ranks 1, 0, −1, 1: response 1 beats 0 and 3, which tie; 2 is absent
    got = preferred_pairs(torch.tensor([[1, 0, -1, 1]]))
    expected = torch.zeros(1, 4, 4, dtype=torch.bool)
    expected[0, 1, 0] = expected[0, 1, 3] = True
    assert torch.equal(got, expected)


def test_score_margins_are_row_less_column(float64):
    expected = float64([[[0.0, -2.0], [2.0, 0.0]]])
    assert torch.equal(score_margins(float64([[1.0, 3.0]])), expected)
