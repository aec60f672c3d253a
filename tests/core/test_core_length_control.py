"""The length-controlled win rate against a grid search and planted effects."""

import math

import pytest
import torch

from lightning_rlhf.core.evaluation import fitted, length_controlled, standardized


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def planted(theta, phi, *, count=20_000, seed=0):
    """Coins of σ(θ + φ·tanh(Δ/std)), and the differences."""
    generator = torch.Generator().manual_seed(seed)
    differences = 30 * torch.randn(count, generator=generator, dtype=torch.float64) + 20  # the policy writes longer
    x = torch.tanh(differences / differences.std())
    coins = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(theta + phi * x)
    return coins.double(), differences


def naive_loss(theta, phi, wins, x, ridge):
    total = 0.0
    for y, z in zip(wins, (theta + phi * xi for xi in x), strict=True):
        total -= y * math.log(sigmoid(z)) + (1 - y) * math.log(1 - sigmoid(z))
    return total / len(wins) + ridge * phi**2 / 2


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_fit_is_the_lowest_point_of_ever_finer_grids(ridge):
    wins, x = [1.0, 0.5, 0.0, 1.0, 0.25], [0.9, -0.3, -0.8, 0.1, 0.4]
    centre, width = (0.0, 0.0), 4.0
    while width > 1e-7:
        grid = [centre[0] + width * i / 5 for i in range(-5, 6)], [centre[1] + width * i / 5 for i in range(-5, 6)]
        centre = min(((a, b) for a in grid[0] for b in grid[1]), key=lambda p: naive_loss(*p, wins, x, ridge))
        width *= 0.7
    found = fitted(*(torch.tensor(v, dtype=torch.float64) for v in (wins, x)), ridge=ridge)
    assert found.tolist() == pytest.approx(centre, abs=1e-5)  # a minimum is known to the root of its value's precision
    assert abs(centre[1]) > 0.1


@pytest.mark.parametrize(("theta", "phi"), [(0.0, 1.5), (0.7, -1.0), (-0.5, 0.0)])
def test_planted_effect_is_found(theta, phi):
    wins, differences = planted(theta, phi)
    found = length_controlled(wins, differences)
    assert found == pytest.approx(sigmoid(theta), abs=0.015)  # 3.5 standard errors of 20,000 coins
    if phi:
        assert abs(float(wins.mean()) - sigmoid(theta)) > 0.05  # which the plain win rate is off


def test_length_that_tells_nothing_leaves_the_win_rate():
    # each difference is won as often as any other: 3 of 4 pairs
    wins, differences = torch.tensor([1.0, 1, 1, 0] * 3), torch.tensor([-5.0] * 4 + [0.0] * 4 + [9.0] * 4)
    assert length_controlled(wins, differences) == pytest.approx(0.75, abs=1e-12)
    assert length_controlled(wins, torch.full((12,), 7.0)) == pytest.approx(0.75, abs=1e-12)
    assert length_controlled(wins, torch.zeros(12)) == pytest.approx(0.75, abs=1e-12)


def test_swapped_sides_have_the_other_share():
    wins, differences = planted(0.4, 0.8, count=200)
    found = length_controlled(wins, differences)
    assert length_controlled(1 - wins, -differences) == pytest.approx(1 - found, abs=1e-9)
    assert found != pytest.approx(0.5, abs=0.05)


def test_equal_lengths_are_where_the_rate_is_read():
    # the same pairs, of which the policy's responses are 20 tokens longer: what was won at 0 is now won at 20
    wins, differences = planted(0.4, 1.5, count=2000)
    assert length_controlled(wins, differences + 20) < length_controlled(wins, differences) - 0.05


def test_unit_of_length_is_no_matter():
    wins, differences = planted(0.4, 0.8, count=200)
    assert length_controlled(wins, 4.2 * differences) == pytest.approx(length_controlled(wins, differences), abs=1e-9)


def test_lengths_that_decide_alone_leave_a_tie():
    # symmetric: every longer response wins, so that nothing is left to quality
    wins, differences = torch.tensor([1.0, 1, 0, 0]), torch.tensor([40.0, 20, -20, -40])
    assert length_controlled(wins, differences) == pytest.approx(0.5, abs=1e-9)
    assert length_controlled(torch.ones(4), differences) == 1.0
    assert length_controlled(torch.zeros(4), differences) == 0.0


def test_one_pair_has_its_own_preference():
    assert length_controlled(torch.tensor([0.3]), torch.tensor([12.0])) == pytest.approx(0.3, abs=1e-6)


def test_standardized_by_hand():
    # std of (0, 2, 4) with Bessel's correction is 2
    found = standardized(torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.0, math.tanh(1), math.tanh(2)], abs=1e-12)


def test_other_shapes_and_no_pairs_are_refused():
    for wins, differences in ((torch.zeros(2), torch.zeros(3)), (torch.zeros(0), torch.zeros(0))):
        with pytest.raises(ValueError, match="must both be"):
            length_controlled(wins, differences)
