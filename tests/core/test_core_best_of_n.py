"""Best-of-n on finite sets, against draws counted one by one."""

import math
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.core.best_of_n import best_of_n, best_of_n_kl, expected_best, n_of_kl

TIGHT = {"rtol": 0, "atol": 1e-12}


def counted(probabilities, scores, n):
    """Every tuple of n draws; the best keeps its probability, ties share it equally by how often they were drawn."""
    mass = [0.0] * len(probabilities)
    for draw in product(range(len(probabilities)), repeat=n):
        weight = math.prod(probabilities[i] for i in draw)
        best = max(scores[i] for i in draw)
        winners = [i for i in draw if scores[i] == best]
        for i in winners:
            mass[i] += weight / len(winners)
    return torch.tensor(mass, dtype=torch.float64)


@st.composite
def bandits(draw):
    size = draw(st.integers(2, 4))
    weights = draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
    scores = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return [w / sum(weights) for w in weights], [float(s) for s in scores]


@given(bandits(), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_best_of_n_equals_counting_every_draw(bandit, n):
    probabilities, scores = bandit
    found = best_of_n(*(torch.tensor(x, dtype=torch.float64) for x in bandit), n=n)
    torch.testing.assert_close(found, counted(probabilities, scores, n), **TIGHT)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)


def test_best_of_n_equals_hand_values():
    # n = 2, π = (½, ¼, ¼), r = (0, 1, 2): the best is 0 in ¼ of the draws, at most 1 in 9/16
    found = best_of_n(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.0, 1.0, 2.0]), n=2)
    torch.testing.assert_close(found, torch.tensor([4 / 16, 5 / 16, 7 / 16]))


def test_best_of_one_is_the_reference():
    probabilities = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(best_of_n(probabilities, torch.tensor([3.0, 3.0, 1.0]), n=1), probabilities, **TIGHT)


def test_best_of_n_of_equal_scores_is_the_reference():
    probabilities = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(best_of_n(probabilities, torch.zeros(3), n=5), probabilities, **TIGHT)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_kl_and_win_rate_stay_below_those_of_scores_without_ties(n):
    probabilities = torch.full((12,), 1 / 12, dtype=torch.float64)
    scores = torch.arange(12.0)
    found = best_of_n(probabilities, scores, n=n)
    kl = float((found * (found / probabilities).log()).sum())
    assert kl < best_of_n_kl(n)
    wins = (scores.unsqueeze(1) > scores.unsqueeze(0)).double() + 0.5 * (scores.unsqueeze(1) == scores).double()
    assert float(found @ wins @ probabilities) < n / (n + 1)


def test_a_fine_set_comes_near_the_bound():
    # control of the bound: with many responses it is tight
    found = best_of_n(torch.full((2000,), 1 / 2000, dtype=torch.float64), torch.arange(2000.0), n=4)
    assert float((found * (found * 2000).log()).sum()) == pytest.approx(best_of_n_kl(4), abs=2e-3)  # 1/2000 · n


@pytest.mark.parametrize("n", [0, -1])
def test_best_of_n_refuses_no_draws(n):
    with pytest.raises(ValueError, match="`n`"):
        best_of_n(torch.tensor([1.0]), torch.tensor([0.0]), n=n)
    with pytest.raises(ValueError, match="`n`"):
        best_of_n_kl(n)


def test_best_of_n_refuses_other_shapes():
    with pytest.raises(ValueError, match="both be"):
        best_of_n(torch.tensor([1.0]), torch.zeros(2), n=2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_expected_best_equals_the_mean_over_all_subsets(n):
    scores = torch.tensor([[0.3, -1.0, 2.0, 2.0, 0.7, 5.0], [1.0, 1.0, 1.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    expected = [sum(map(max, combinations(row, n))) / math.comb(6, n) for row in scores.tolist()]
    assert expected_best(scores, n=n).tolist() == pytest.approx(expected, abs=1e-12)


def test_expected_best_is_unbiased_for_best_of_n():
    """Over every way to draw 3 responses of a set, its mean is the score of the exact best-of-2."""
    probabilities, scores = (0.5, 0.3, 0.2), (0.0, 1.0, 3.0)
    mean = 0.0
    for draw in product(range(3), repeat=3):
        drawn = torch.tensor([[scores[i] for i in draw]], dtype=torch.float64)
        mean += math.prod(probabilities[i] for i in draw) * float(expected_best(drawn, n=2))
    best = best_of_n(*(torch.tensor(x, dtype=torch.float64) for x in (probabilities, scores)), n=2)
    assert mean == pytest.approx(float(best @ torch.tensor(scores, dtype=torch.float64)), abs=1e-12)


@pytest.mark.parametrize("n", [0, 4])
def test_expected_best_refuses_more_than_there_are(n):
    with pytest.raises(ValueError, match="between 1 and the 3 scores"):
        expected_best(torch.zeros(2, 3), n=n)


@pytest.mark.parametrize("n", [1, 2, 4.5, 16, 3000])
def test_n_of_kl_undoes_the_kl(n):
    assert n_of_kl(math.log(n) - (n - 1) / n) == pytest.approx(n, rel=1e-6)


def test_n_of_kl_by_hand_and_refusals():
    assert n_of_kl(0.0) == pytest.approx(1.0, abs=1e-7)  # flat there: the KL is (n − 1)²/2
    assert n_of_kl(math.log(2) - 0.5) == pytest.approx(2.0, abs=1e-12)
    with pytest.raises(ValueError, match="`kl`"):
        n_of_kl(-0.1)
