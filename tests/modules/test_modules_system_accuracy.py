"""Accuracy by who wrote the responses."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.modules.reward_metrics import SystemAccuracy


@pytest.fixture
def alone(make_trainer):
    """A stand-in for a module that one process trains."""

    class Alone:
        trainer = _trainer = make_trainer()

    return Alone()


def pairs_of(*ranks: list[int]) -> torch.Tensor:
    """By a loop over prompts and pairs, (B, K, K); −1 is absent."""
    k = max(map(len, ranks))
    found = torch.zeros(len(ranks), k, k, dtype=torch.bool)
    for b, rank in enumerate(ranks):
        for i, better in enumerate(rank):
            for j, worse in enumerate(rank):
                found[b, i, j] = 0 <= better < worse
    return found


def test_pair_counts_for_both_of_its_systems(alone):
    # x > y > z: pairs (x, y) right, (x, z) wrong, (y, z) right; their winners are longer, shorter, equally long
    metric = SystemAccuracy()
    metric.update(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([3, -8, 0]), pairs_of([0, 1, 2]), [["x", "y", "z"]])
    assert metric.compute(alone) == pytest.approx(
        {"accuracy/x": 0.5, "longer_wins/x": 0.5, "pairs/x": 2}
        | {"accuracy/y": 1.0, "longer_wins/y": 0.75, "pairs/y": 2}
        | {"accuracy/z": 0.5, "longer_wins/z": 0.25, "pairs/z": 2},
        abs=1e-12,
    )


def test_pair_within_a_system_counts_once_and_a_tied_score_is_wrong(alone):
    metric = SystemAccuracy()
    metric.update(torch.tensor([0.0]), torch.tensor([5]), pairs_of([1, 0]), [["x", "x"]])
    assert metric.compute(alone) == {"accuracy/x": 0.0, "longer_wins/x": 1.0, "pairs/x": 1}


def test_names_follow_the_order_of_pairs_not_of_ranks(alone):
    """Ragged prompts, the second without names, the best response last."""
    metric = SystemAccuracy()
    pairs = pairs_of([1, 2, 0], [0, 1, -1], [1, 0, -1])
    assert pairs.nonzero().tolist() == [[0, 0, 1], [0, 2, 0], [0, 2, 1], [1, 0, 1], [2, 1, 0]]
    margins, longer = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]), torch.tensor([1, 1, -1, 1, 1])
    metric.update(margins, longer, pairs, [["x", "y", "z"], [], ["y", "w"]])
    found = metric.compute(alone)
    assert {name: found[f"accuracy/{name}"] for name in "wxyz"} == {"w": 1.0, "x": 0.5, "y": 2 / 3, "z": 0.0}
    assert {name: found[f"pairs/{name}"] for name in "wxyz"} == {"w": 1, "x": 2, "y": 3, "z": 2}


def test_batches_add_up_until_a_new_evaluation(alone):
    metric = SystemAccuracy()
    for right in (1.0, -1.0, -1.0):
        metric.update(torch.tensor([right]), torch.tensor([1]), pairs_of([0, 1]), [["x", "y"]])
    assert metric.compute(alone)["accuracy/y"] == pytest.approx(1 / 3, abs=1e-12)
    metric.begin()
    assert metric.compute(alone) == {}


@pytest.mark.parametrize("name", ["a b\nc", "naïve/猫", 'quoted "x", y', "", "\0"])
def test_any_text_is_a_name(alone, name):
    metric = SystemAccuracy()
    metric.update(torch.tensor([1.0]), torch.tensor([1]), pairs_of([0, 1]), [[name, "y"]])
    assert metric.compute(alone)[f"accuracy/{name}"] == 1.0


def test_without_names_nothing_is_logged(alone):
    metric = SystemAccuracy()
    for systems in ((), [[], []]):
        metric.update(torch.tensor([1.0, 1.0]), torch.tensor([1, 1]), pairs_of([0, 1], [0, 1]), systems)
    assert metric.compute(alone) == {}
