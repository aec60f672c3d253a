import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import Centered, PlackettLuce, RankingLoss, preferred_pairs, score_margins

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}


LOSSES = {
    "ranking": RankingLoss(),
    "margin": RankingLoss(margin=0.7),
    "plackett_luce": PlackettLuce(),
    "centered": Centered(),
    "centered_plackett_luce": Centered(loss=PlackettLuce(), coef=0.3),
}
RELATIVE = ["ranking", "margin", "plackett_luce"]  # of the score differences alone


def naive_pairs(rank):
    every = range(len(rank))
    return [(i, j) for i in every for j in every if rank[i] >= 0 and rank[j] >= 0 and rank[i] < rank[j]]


def naive(scores, rank, strength=None, m=0.0):
    """eq. 1 of one prompt by a pair loop in Python floats; the loss and its gradient."""
    pairs = naive_pairs(rank)
    loss, gradient = 0.0, [0.0] * len(rank)
    for i, j in pairs:
        margin = scores[i] - scores[j] - (m * (strength[i] - strength[j]) if m else 0.0)
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


@st.composite
def rated_rankings(draw):
    """The same with a rating of every response."""
    scores, rank = draw(rankings())
    k = len(rank[0])
    return scores, rank, [draw(st.lists(st.floats(-5, 5), min_size=k, max_size=k)) for _ in rank]


def tensors(scores, rank, strength):
    """The case as tensors, NaN where a response is absent; the scores take a gradient."""
    ranks = torch.tensor(rank)
    x, s = (torch.tensor(y, dtype=torch.float64).masked_fill(ranks < 0, NAN) for y in (scores, strength))
    return x.requires_grad_(), ranks, s


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


# The margin


@given(rated_rankings(), st.floats(0.01, 3))
@settings(deadline=None, max_examples=50)
def test_margin_loss_equals_a_naive_pair_loop_with_its_gradient(case, m):
    x, ranks, s = tensors(*case)
    loss = RankingLoss(margin=m)(x, ranks, s)
    loss.sum().backward()
    for b, (row, order, rating) in enumerate(zip(*case, strict=True)):
        expected, gradient = naive(row, order, rating, m)
        assert abs(float(loss[b].detach()) - expected) <= 1e-9
        assert_close(x.grad[b], torch.tensor(gradient, dtype=torch.float64), **TIGHT)


def test_margin_equals_hand_value(float64):
    # score margin 2, ratings 7 and 4, m = 0.5: −log σ(2 − 1.5)
    scores, rank, strength = float64([[3.0, 1.0]]), torch.tensor([[0, 1]]), float64([[7.0, 4.0]])
    found = RankingLoss(margin=0.5)(scores, rank, strength)
    assert_close(found, float64([math.log1p(math.exp(-0.5))]), **TIGHT)
    # negative control: a margin of the other sign makes it cheaper
    assert abs(float(found) - math.log1p(math.exp(-3.5))) > 0.1


def test_ratings_move_nothing_without_a_margin(float64):
    scores, rank = float64([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]])
    plain = RankingLoss()(scores, rank)
    for strength in (float64([[9.0, 5.0, 1.0]]), torch.full((1, 3), NAN)):
        assert torch.equal(RankingLoss()(scores, rank, strength), plain)
    assert not torch.equal(RankingLoss(margin=0.1)(scores, rank, float64([[9.0, 5.0, 1.0]])), plain)


@pytest.mark.parametrize("loss", [RankingLoss(margin=0.5), Centered(loss=RankingLoss(margin=0.5))])
@pytest.mark.parametrize(
    ("strength", "count"), [(None, 3), ([[1.0, NAN, 0.0]], 2), ([[NAN] * 3], 3), ([[math.inf, 1.0, 0.0]], 2)]
)
def test_margin_without_ratings_is_refused(float64, loss, strength, count):
    message = rf"`margin=0.5` needs the ratings .* for {count} of 3 pairs; give the rows `scores` .*or set `margin=0.0`"
    with pytest.raises(ValueError, match=message):
        loss(float64([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]]), None if strength is None else float64(strength))


def test_margin_needs_ratings_only_where_there_is_a_pair(float64):
    # a tie of unrated responses, an absent one, and a pair that is rated
    scores, rank = float64([[1.0, 2.0, 0.0], [1.0, NAN, 3.0]]), torch.tensor([[0, 0, -1], [0, -1, 1]])
    found = RankingLoss(margin=2.0)(scores, rank, float64([[NAN, NAN, NAN], [1.0, NAN, 0.0]]))
    assert_close(found, float64([0.0, math.log1p(math.exp(4.0))]), **TIGHT)
    assert torch.equal(RankingLoss(margin=2.0)(scores[:1], rank[:1]), torch.zeros(1, dtype=torch.float64))


# Plackett–Luce


def naive_plackett_luce(scores, rank):
    """Draws of one prompt: each response against itself and what is strictly below; the mean over those with any."""
    losses = []
    for k, place in enumerate(rank):
        below = [scores[j] for j, other in enumerate(rank) if place >= 0 and other > place]
        if below:
            losses.append(math.log(sum(math.exp(r) for r in [scores[k], *below])) - scores[k])
    return sum(losses) / max(len(losses), 1)


@given(rankings())
@settings(deadline=None, max_examples=50)
def test_plackett_luce_equals_a_naive_loop(case):
    x, ranks, _ = tensors(*case, case[0])
    loss = PlackettLuce()(x, ranks)
    expected = [naive_plackett_luce(*row) for row in zip(*case, strict=True)]
    assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), **TIGHT)


@given(st.integers(2, 5).flatmap(lambda k: st.lists(st.floats(-5, 5), min_size=k, max_size=k)))
@settings(deadline=None, max_examples=20)
def test_plackett_luce_is_a_distribution_over_rankings(scores):
    k = len(scores)
    ranks = torch.tensor(list(permutations(range(k))))
    x = torch.tensor([scores], dtype=torch.float64).expand(ranks.shape)
    assert abs(float((-(k - 1) * PlackettLuce()(x, ranks)).exp().sum()) - 1) <= 1e-9


def test_pairs_of_a_ranking_are_no_distribution_over_rankings(float64):
    """Negative control: eq. 1 takes pairs for independent; of 3 equal scores each ranking has (1/2)³, not 1/6."""
    ranks = torch.tensor(list(permutations(range(3))))
    found = (-3 * RankingLoss()(torch.zeros(6, 3, dtype=torch.float64), ranks)).exp().sum()
    assert_close(found, float64(0.75), **TIGHT)


def test_plackett_luce_equals_hand_value(float64):
    # scores 3, 1, 2 of ranks 0, 1, 2: 3 against {3, 1, 2}, then 1 against {1, 2}; 2 is drawn alone
    first = math.log(math.exp(3) + math.exp(1) + math.exp(2)) - 3
    second = math.log(math.exp(1) + math.exp(2)) - 1
    scores, rank = float64([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]])
    assert_close(PlackettLuce()(scores, rank), float64([(first + second) / 2]), **TIGHT)
    assert abs(float(PlackettLuce()(scores, rank) - RankingLoss()(scores, rank))) > 0.1  # not eq. 1 for K > 2


@given(st.floats(-20, 20), st.floats(-20, 20), st.sampled_from([[0, 1], [1, 0], [2, 2], [0, -1]]))
@settings(deadline=None, max_examples=50)
def test_plackett_luce_of_two_is_bradley_terry(a, b, rank):
    x, ranks = torch.tensor([[a, b]], dtype=torch.float64), torch.tensor([rank])
    assert abs(float(PlackettLuce()(x, ranks)) - naive([a, b], rank)[0]) <= 1e-9


@pytest.mark.parametrize("k", [2, 3, 9])
@pytest.mark.parametrize("loss", [RankingLoss(), PlackettLuce()])
def test_best_of_equal_scores_is_pushed_by_one_over_k(float64, loss, k):
    # eq. 1: (K−1)/2 over C(K,2); Plackett–Luce: (1 − 1/K) over K − 1
    scores = float64([[0.0] * k], requires_grad=True)
    loss(scores, torch.arange(k).unsqueeze(0)).sum().backward()
    assert abs(float(scores.grad[0, 0]) + 1 / k) <= 1e-9


def test_tied_responses_do_not_compete(float64):
    # 5 and 1 tie above 0: log(1 + e⁻⁵) and log(1 + e⁻¹)
    expected = (math.log1p(math.exp(-5)) + math.log1p(math.exp(-1))) / 2
    assert_close(PlackettLuce()(float64([[5.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1]])), float64([expected]), **TIGHT)


# What every loss has in common


@pytest.mark.parametrize("name", LOSSES)
@given(rated_rankings(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=25)
def test_loss_is_unmoved_by_permutation(name, case, random):
    x, ranks, s = tensors(*case)
    order = list(range(x.shape[1]))
    random.shuffle(order)
    found = LOSSES[name](x[:, order], ranks[:, order], s[:, order])
    assert_close(found, LOSSES[name](x, ranks, s), rtol=1e-12, atol=1e-9)  # the centring term reaches 400


@pytest.mark.parametrize("name", RELATIVE)
@given(rated_rankings(), st.floats(-50, 50))
@settings(deadline=None, max_examples=25)
def test_loss_of_differences_ignores_a_shift_and_its_gradient_sums_to_zero(name, case, shift):
    x, ranks, s = tensors(*case)
    loss = LOSSES[name](x, ranks, s)
    assert_close(LOSSES[name](x + shift, ranks, s), loss, **TIGHT)
    loss.sum().backward()
    assert float(x.grad.sum(1).abs().max()) <= 1e-9


@pytest.mark.parametrize("name", ["centered", "centered_plackett_luce"])
def test_centered_loss_sees_a_shift(float64, name):
    scores, rank = float64([[1.0, -1.0]], requires_grad=True), torch.tensor([[0, 1]])
    loss, moved = LOSSES[name](scores, rank), LOSSES[name](scores + 1.0, rank)
    # (1 − 1)² and (2 + 0)²
    assert_close((moved - loss).detach(), float64([4 * LOSSES[name].coef]), **TIGHT)
    moved.sum().backward()
    assert_close(scores.grad.sum(), float64(2 * 2 * 2 * LOSSES[name].coef), **TIGHT)  # 2·(r_w + r_l) on either side


@given(rated_rankings(), st.floats(0, 2))
@settings(deadline=None, max_examples=25)
def test_centring_term_equals_a_naive_pair_loop(case, coef):
    x, ranks, s = tensors(*case)
    found = Centered(coef=coef)(x, ranks, s).detach()
    for b, (row, order, _) in enumerate(zip(*case, strict=True)):
        pairs = naive_pairs(order)
        term = coef * sum((row[i] + row[j]) ** 2 for i, j in pairs) / max(len(pairs), 1)
        assert float(found[b]) == pytest.approx(naive(row, order)[0] + term, rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e300])
def test_absent_response_has_no_influence_in_value_and_gradient(float64, name, junk):
    scores, rank, strength = [0.5, -1.0, 0.25], [1, 0, 1], [1.0, 3.0, 1.0]
    plain, padded = float64([scores], requires_grad=True), float64([[junk, *scores, junk]], requires_grad=True)
    expected = LOSSES[name](plain, torch.tensor([rank]), float64([strength]))
    found = LOSSES[name](padded, torch.tensor([[-1, *rank, -1]]), float64([[junk, *strength, NAN]]))
    assert_close(found, expected, **TIGHT)
    expected.sum().backward()
    found.sum().backward()
    assert_close(padded.grad[:, 1:-1], plain.grad, **TIGHT)
    assert torch.equal(padded.grad[:, [0, -1]], float64([[0.0, 0.0]]))


@pytest.mark.parametrize("name", LOSSES)
def test_prompt_of_ties_is_zero_with_zero_gradient(float64, name):
    scores = float64([[1.0, 2.0], [1.0, NAN], [NAN, NAN]], requires_grad=True)
    strength = torch.full((3, 2), NAN)
    loss = LOSSES[name](scores, torch.tensor([[0, 0], [0, -1], [-1, -1]]), strength)
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_finite_at_extreme_margins(float64, name):
    # −log of a probability of e^−1000; η (1000 + 0)² where centered
    scores = float64([[1000.0, 0.0], [0.0, 1000.0]], requires_grad=True)
    loss = LOSSES[name](scores, torch.tensor([[0, 1], [0, 1]]), float64([[0.0, 0.0], [0.0, 0.0]]))
    loss.sum().backward()
    eta = getattr(LOSSES[name], "coef", 0.0)
    assert_close(loss.detach(), float64([0.0, 1000.0]) + eta * 1e6, rtol=1e-12, atol=1e-9)
    push = 2 * eta * 1000
    assert_close(scores.grad, float64([[push, push], [push - 1.0, push + 1.0]]), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_dtype_of_its_scores_and_leaves_its_arguments(name):
    for scores in (torch.float32, torch.float64):
        for ratings in (torch.float32, torch.float64, torch.bfloat16):
            x, rank = torch.tensor([[1.0, 2.0, 0.5]], dtype=scores), torch.tensor([[2, 0, 1]])
            strength = torch.tensor([[0.0, 2.0, 1.0]], dtype=ratings)
            before = [y.clone() for y in (x, rank, strength)]
            assert LOSSES[name](x, rank, strength).dtype == scores
            assert all(torch.equal(y, old) for y, old in zip((x, rank, strength), before, strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RankingLoss(), RankingLoss(margin=0.1)),
        (Centered(), Centered(coef=0.02)),
        (Centered(), Centered(loss=PlackettLuce())),
    ],
)
def test_every_argument_moves_the_loss(float64, one, other):
    case = float64([[3.0, 1.0, 2.0]]), torch.tensor([[0, 1, 2]]), float64([[2.0, 1.0, 0.0]])
    assert abs(float(one(*case) - other(*case))) > 1e-3


@pytest.mark.parametrize("bad", [-0.1, math.inf, NAN])
def test_bad_argument_is_explained(bad):
    with pytest.raises(ValueError, match="`margin` must be a number of at least 0"):
        RankingLoss(margin=bad)
    with pytest.raises(ValueError, match="`coef` must be a number of at least 0"):
        Centered(coef=bad)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_are_compared(float64, name):
    with pytest.raises(ValueError, match=r"`rank` must have the shape of `scores`, \(1, 2\): got \(1, 3\)"):
        LOSSES[name](float64([[1.0, 2.0]]), torch.tensor([[0, 1, 2]]), float64([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"`strength` must have the shape of `scores`, \(1, 2\): got \(1,\)"):
        RankingLoss(margin=1.0)(float64([[1.0, 2.0]]), torch.tensor([[0, 1]]), float64([1.0]))
