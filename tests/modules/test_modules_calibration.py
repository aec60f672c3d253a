"""Accuracy by confidence, and the expected calibration error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.modules.reward_metrics import Calibration


def measured(*batches: list[float]) -> dict[str, float]:
    metric = Calibration()
    for batch in batches:
        metric.update(torch.tensor(batch, dtype=torch.float64))
    return {name: float(value) for name, value in metric.compute().items()}


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_bins_equal_hand_values():
    # confidences 0.55 right, 0.58 wrong, 0.95 right, 0.97 right; nothing between 0.6 and 0.9
    found = measured([logit(0.55), -logit(0.58)], [logit(0.95), logit(0.97)])
    expected = {
        "accuracy_confidence_50_60": 0.5,
        "mean_confidence_50_60": 0.565,
        "pairs_confidence_50_60": 2,
        "accuracy_confidence_90_100": 1.0,
        "mean_confidence_90_100": 0.96,
        "pairs_confidence_90_100": 2,
        "calibration_error": (2 * abs(0.5 - 0.565) + 2 * abs(1 - 0.96)) / 4,
    }
    assert found == pytest.approx(expected, abs=1e-12)
    # negative control: the opposite labels
    assert abs(measured([-logit(0.55), logit(0.58), -logit(0.95), -logit(0.97)])["calibration_error"] - 0.05) > 0.1


def test_equal_scores_are_of_confidence_one_half_and_wrong():
    expected = {"accuracy_confidence_50_60": 0, "mean_confidence_50_60": 0.5, "pairs_confidence_50_60": 2}
    assert measured([0.0, 0.0]) == pytest.approx(expected | {"calibration_error": 0.5}, abs=1e-12)


@pytest.mark.parametrize(("low", "name"), [(0.6, "60_70"), (0.7, "70_80"), (0.8, "80_90"), (0.9, "90_100")])
def test_edges_belong_to_the_bin_above(low, name):
    at = logit(low) + 1e-12  # rounding must not decide
    assert measured([at])[f"pairs_confidence_{name}"] == 1
    assert f"pairs_confidence_{name}" not in measured([at - 1e-9])


def test_sure_pair_is_in_the_last_bin():
    assert measured([1000.0])["mean_confidence_90_100"] == 1.0


def test_calibrated_scores_have_no_error():
    # 10 pairs of confidence 0.7 of which 7 are right
    found = measured([logit(0.7) + 1e-12] * 7 + [-logit(0.7) - 1e-12] * 3)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-9)
    assert found["accuracy_confidence_70_80"] == pytest.approx(0.7, abs=1e-12)


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=30), st.integers(0, 30))
@settings(deadline=None, max_examples=50)
def test_calibration_equals_a_naive_loop_however_the_pairs_are_split(margins, cut):
    bins = {name: [] for name in ("50_60", "60_70", "70_80", "80_90", "90_100")}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        if any(abs(confidence - edge) < 1e-12 for edge in (0.6, 0.7, 0.8, 0.9)):
            return  # rounding must not decide
        place = sum(confidence >= edge for edge in (0.6, 0.7, 0.8, 0.9))
        list(bins.values())[place].append((margin > 0, confidence))
    expected, error = {}, 0.0
    for name, pairs in bins.items():
        if pairs:
            accuracy, sure = (sum(x) / len(pairs) for x in zip(*pairs, strict=True))
            error += len(pairs) / len(margins) * abs(accuracy - sure)
            expected |= {f"accuracy_confidence_{name}": accuracy, f"mean_confidence_{name}": sure}
            expected[f"pairs_confidence_{name}"] = len(pairs)
    found = measured(margins[:cut], margins[cut:])
    assert found == pytest.approx(expected | {"calibration_error": error}, abs=1e-9)
