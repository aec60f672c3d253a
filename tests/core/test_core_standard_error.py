"""Standard errors by hand and against their meaning."""

import math

import pytest
import torch

from lightning_rlhf.core.evaluation import ratio_standard_error, standard_error


def test_standard_error_by_hand():
    # mean 2, squares of deviations 1 + 0 + 1 over 2, so s = 1
    assert standard_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(1 / math.sqrt(3))
    assert standard_error(torch.tensor([4, 4])) == 0.0
    assert math.isnan(standard_error(torch.tensor([4.0])))


def test_ratio_by_hand():
    # ρ = 12/4 = 3; residuals 2 − 3 = −1 and 10 − 9 = 1; √(2/1·2)/4
    assert ratio_standard_error(torch.tensor([2.0, 10.0]), torch.tensor([1, 3])) == pytest.approx(0.5)
    assert math.isnan(ratio_standard_error(torch.tensor([2.0]), torch.tensor([1.0])))


def test_ratio_of_equal_counts_is_the_mean():
    totals = torch.tensor([1.0, 5.0, 3.0, 2.5])
    assert ratio_standard_error(totals, torch.full((4,), 5.0)) == pytest.approx(standard_error(totals / 5))


def test_ratio_varies_as_it_says():
    """Over 2,000 samples of 50 texts, whose totals follow their counts."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 9, (2000, 50), generator=generator).double()
    totals = 2 * counts + torch.randn(2000, 50, generator=generator, dtype=torch.float64) * counts.sqrt()
    ratios = totals.sum(1) / counts.sum(1)
    said = sum(ratio_standard_error(*pair) for pair in zip(totals, counts, strict=True)) / 2000
    assert said == pytest.approx(float(ratios.std()), rel=0.06)  # a std of 2,000 draws is known to 1.6 %
    naive = sum(standard_error(t) / float(c.mean()) for t, c in zip(totals, counts, strict=True)) / 2000
    assert naive > 1.5 * said  # control: what forgets that counts vary is far off
