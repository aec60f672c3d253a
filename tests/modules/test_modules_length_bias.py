"""Accuracy by length difference, and the correlation of score and length."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.modules.reward_metrics import LengthAccuracy, LengthCorrelation

ALL, WITHIN = "score_length_correlation", "score_length_correlation_within_prompt"


def pearson(x: list[float], y: list[float]) -> float:
    """From deviations, not from moments."""
    dx, dy = ([v - sum(z) / len(z) for v in z] for z in (x, y))
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / math.sqrt(sum(a * a for a in dx) * sum(b * b for b in dy))


def correlations(*batches) -> dict[str, float]:
    metric = LengthCorrelation()
    for scores, lengths, present in batches:
        metric.update(torch.tensor(scores, dtype=torch.float64), torch.tensor(lengths), torch.tensor(present))
    return {name: float(value) for name, value in metric.compute().items()}


def test_accuracy_by_length_equals_hand_values():
    # preferred longer by 30 right, by 11 wrong; by 10 right, 0 wrong and right, −10 right; shorter by 11 wrong
    metric = LengthAccuracy()
    metric.update(torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([30, 11, 10, 0]))
    metric.update(torch.tensor([3.0, 0.5, -2.0]), torch.tensor([0, -10, -11]))
    found = {name: float(value) for name, value in metric.compute().items()}
    expected = {"accuracy_longer": 0.5, "pairs_longer": 2, "accuracy_similar": 0.75, "pairs_similar": 4}
    expected |= {"longer_wins": 4 / 7}  # 30, 11 and 10 longer, and half of two of equal length
    assert found == pytest.approx(expected | {"accuracy_shorter": 0.0, "pairs_shorter": 1}, abs=1e-12)


def test_length_without_a_pair_is_not_named():
    metric = LengthAccuracy()
    metric.update(torch.tensor([1.0]), torch.tensor([500]))
    assert metric.compute().keys() == {"longer_wins", "accuracy_longer", "pairs_longer"}


def test_score_that_is_the_length_is_right_where_longer_is_better_and_wrong_elsewhere():
    longer = torch.tensor([50, 20, -20, -50])
    metric = LengthAccuracy()
    metric.update(longer.double(), longer)
    found = metric.compute()
    assert (float(found["accuracy_longer"]), float(found["accuracy_shorter"])) == (1.0, 0.0)


def test_correlation_equals_hand_values():
    # all: (0, 3), (2, 5), (1, 10): deviations −1, 1, 0 and −3, −1, 4, so 2/√(2·26); the second prompt is alone: 0, 0
    found = correlations(([[0.0, 2.0], [1.0, math.nan]], [[3, 5], [10, 99]], [[True, True], [True, False]]))
    assert found == pytest.approx({ALL: 2 / math.sqrt(52), WITHIN: 1.0}, abs=1e-9)


def test_correlation_within_prompts_ignores_prompt_length_and_a_constant_per_prompt():
    scores, lengths, present = [[0.3, 1.0, -1.0], [2.0, 0.1, 0.4]], [[7, 9, 9], [4, 8, 6]], [[True] * 3] * 2
    moved = [[s - 50.0 for s in scores[0]], scores[1]], [[n + 1000 for n in lengths[0]], lengths[1]]
    plain, shifted = correlations((scores, lengths, present)), correlations((*moved, present))
    assert shifted[WITHIN] == pytest.approx(plain[WITHIN], abs=1e-9)
    assert abs(shifted[ALL] - plain[ALL]) > 0.1  # negative control: over all responses they decide
    assert shifted[ALL] < -0.9


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 2000), st.integers(0, 3)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_correlation_equals_naive_deviations(responses):
    """The last entry names the prompt; a grid (4, 20) holds its responses, the rest is absent."""
    rows = [[(s, n) for s, n, prompt in responses if prompt == b] for b in range(4)]
    grid = [[row[k] if k < len(row) else (math.nan, -7) for k in range(20)] for row in rows]
    present = [[k < len(row) for k in range(20)] for row in rows]
    scores, lengths = ([[cell[i] for cell in row] for row in grid] for i in (0, 1))
    halves = [(scores[b : b + 2], lengths[b : b + 2], present[b : b + 2]) for b in (0, 2)]
    found = correlations(*halves)
    pairs = {ALL: [pair for row in rows for pair in row], WITHIN: []}
    for row in rows:
        middle = [sum(cell[i] for cell in row) / len(row) for i in (0, 1)] if row else None
        pairs[WITHIN] += [(s - middle[0], n - middle[1]) for s, n in row]
    for name, observed in pairs.items():
        x, y = zip(*observed, strict=True)
        spread = min(sum((v - sum(z) / len(z)) ** 2 for v in z) for z in (x, y))
        if spread > 1e-3:  # below it rounding decides
            assert found[name] == pytest.approx(pearson(x, y), abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "lengths"), [([[0.1, 0.1, 0.1]], [[3, 4, 9]]), ([[0.1, 0.7, 0.3]], [[5, 5, 5]]), ([[0.1]], [[5]])]
)
def test_constant_has_no_correlation_with_anything(scores, lengths):
    assert ALL not in correlations((scores, lengths, [[True] * len(scores[0])]))
