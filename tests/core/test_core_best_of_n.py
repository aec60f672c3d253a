"""Best-of-n against draws counted one by one."""

import math
from itertools import combinations, product

import pytest
import torch

from lightning_rlhf.core.evaluation import best_of_n_kl, expected_best, n_of_kl


@pytest.mark.parametrize("n", [0, -1])
def test_best_of_n_refuses_no_draws(n):
    with pytest.raises(ValueError, match="`n`"):
        best_of_n_kl(n)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_expected_best_equals_the_mean_over_all_subsets(n):
    scores = torch.tensor([[0.3, -1.0, 2.0, 2.0, 0.7, 5.0], [1.0, 1.0, 1.0, 0.0, 0.0, 4.0]], dtype=torch.float64)
    expected = [sum(map(max, combinations(row, n))) / math.comb(6, n) for row in scores.tolist()]
    assert expected_best(scores, n=n).tolist() == pytest.approx(expected, abs=1e-12)


def test_expected_best_is_unbiased_for_best_of_n():
    """Over every way to draw 3 responses of a set, its mean is that of the best over every way to draw 2."""
    probabilities, scores = (0.5, 0.3, 0.2), (0.0, 1.0, 3.0)
    mean = 0.0
    for draw in product(range(3), repeat=3):
        drawn = torch.tensor([[scores[i] for i in draw]], dtype=torch.float64)
        mean += math.prod(probabilities[i] for i in draw) * float(expected_best(drawn, n=2))
    pairs = product(range(3), repeat=2)
    best = sum(probabilities[i] * probabilities[j] * max(scores[i], scores[j]) for i, j in pairs)
    assert mean == pytest.approx(best, abs=1e-12)


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


def test_expected_best_of_a_pool_bounds_that_of_its_prompts():
    prompts = [torch.tensor([0.0, 1.0, 5.0]), torch.tensor([2.0, 2.0, 2.5])]

    def best(scores, n):
        """E[max] of n independent draws, each score as likely as the others."""
        return math.fsum(max(draw) for draw in product(scores.tolist(), repeat=n)) / len(scores) ** n

    for n in (2, 3):
        assert best(torch.cat(prompts), n) > sum(best(prompt, n) for prompt in prompts) / 2 + 0.1
    assert best(torch.cat(prompts), 1) == pytest.approx(12.5 / 6)  # control: of one draw they are equal


def test_expected_best_of_many_does_not_overflow():
    # 0 … N − 1 without ties: E[max of n] = n(N + 1)/(n + 1) − 1
    found = expected_best(torch.arange(3000.0, dtype=torch.float64), n=1500)
    assert float(found) == pytest.approx(1500 * 3001 / 1501 - 1, rel=1e-9)
