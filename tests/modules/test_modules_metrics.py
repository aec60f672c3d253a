"""Sums over all processes, in float64 whatever the module is cast to."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.modules.reward_metrics import Calibration, LengthAccuracy, LengthCorrelation, Mean, binned

MARGINS = torch.tensor([1.3, -0.2, 0.4, 3.0, -1.0])
LONGER = torch.tensor([12, -3, -40, 0, 11])
SCORES, LENGTHS = torch.tensor([[0.3, 1.7, -2.0], [0.5, 0.1, 9.0]]), torch.tensor([[7, 9, 4], [12, 13, 50]])
PRESENT = torch.tensor([[True, True, True], [True, True, False]])
EVERY = {Mean: (MARGINS,), Calibration: (MARGINS,), LengthAccuracy: (MARGINS, LONGER)}
EVERY |= {LengthCorrelation: (SCORES, LENGTHS, PRESENT)}


def numbers(metric) -> dict[str, float]:
    found = metric.compute()
    return {k: float(v) for k, v in (found if isinstance(found, dict) else {"mean": found}).items()}


def test_mean_is_of_all_numbers_and_truth_values():
    metric = Mean()
    metric.update(torch.tensor([[1.0, 2.0], [4.0, 0.0]]))
    metric.update(torch.tensor([True, False]))
    assert float(metric.compute()) == pytest.approx(8 / 6, abs=1e-12)  # not the mean of the means 7/4 and 1/2


def test_binned_equals_a_loop():
    bins, values = [2, 0, 2, 2], [1.5, -1.0, 0.25, 3.0]
    found = binned(torch.tensor(bins), 4, torch.tensor(values), torch.tensor(values) > 1)
    expected = [[0.0, 0.0, 0.0] for _ in range(4)]
    for place, value in zip(bins, values, strict=True):
        expected[place] = [a + b for a, b in zip(expected[place], (1, value, value > 1), strict=True)]
    assert found.tolist() == expected
    assert found.dtype == torch.float64
    assert not binned(torch.zeros(0, dtype=torch.int64), 4, torch.zeros(0)).any()


@pytest.mark.parametrize("kind", EVERY)
def test_states_of_two_processes_add_up(kind):
    """What `dist_reduce_fx="sum"` makes of two processes with unequal shares is what one with all of it finds."""
    whole, parts = kind(), [kind(), kind()]
    whole.update(*EVERY[kind])
    for part, share in zip(parts, (slice(0, 1), slice(1, None)), strict=True):
        part.update(*(x[share] for x in EVERY[kind]))
    alone = numbers(parts[1])
    parts[1]._computed = None
    reduce = parts[0]._reductions["sums"]
    parts[1].sums = reduce(torch.stack([part.sums for part in parts]))
    assert numbers(parts[1]) == pytest.approx(numbers(whole), abs=1e-12)
    assert alone != pytest.approx(numbers(whole), abs=1e-3)


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
@pytest.mark.parametrize("kind", EVERY)
def test_sums_stay_float64_under_a_precision_plugin(kind, cast):
    """`precision=bf16-true` casts by `module.to`, which torchmetrics lets through; 256 + 1 is 256 in bfloat16."""
    module = torch.nn.Module()
    module.metric = kind()
    cast(module)
    module.metric.reset()
    for _ in range(3):
        module.metric.update(*EVERY[kind])
    assert module.metric.sums.dtype == torch.float64
    once = kind()
    once.update(*EVERY[kind])
    assert torch.allclose(module.metric.sums, 3 * once.sums, rtol=1e-12)
    many = Mean()
    module.mean = many
    cast(module)
    many.reset()
    for _ in range(300):
        many.update(torch.ones(1))
    assert many.sums.tolist() == [300, 300]
