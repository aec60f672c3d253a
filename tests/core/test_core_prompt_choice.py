"""Dynamic sampling and curriculum as values: which groups teach, how a pass rate moves, who rests."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.core import DAPO, GDPO, Algorithm, Curriculum, DynamicSampling
from lightning_rlhf.types import Objectives


def test_group_teaches_if_its_scores_differ():
    assert Algorithm().teaches(torch.tensor([1.0, 0.0, 1.0]))
    assert not Algorithm().teaches(torch.tensor([0.1, 0.1, 0.1]))


def test_equal_scores_that_float32_cannot_average_do_not_teach():
    """The mean of three times 0.1 is not 0.1 in float32: a tolerance of 0 on the spread would keep the group."""
    assert not Algorithm().teaches(torch.full((3,), 0.1))
    assert Algorithm().teaches(torch.tensor([0.1, 0.1, 0.1 + 1e-8], dtype=torch.float64))


def test_parts_that_cancel_teach_where_each_is_credited_alone():
    """Parts 1·[.1, 0, .1, 0] and .1·[0, 1, 0, 1] have one total, and GDPO's advantages of both are not 0."""
    scores = torch.tensor([[0.1, 0.0], [0.0, 1.0], [0.1, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.1], dtype=torch.float64)
    total = (scores @ weights).round(decimals=12)
    assert GDPO().teaches(total, Objectives(scores, weights))
    assert not DAPO().teaches(total, Objectives(scores, weights))
    silent = torch.tensor([[0.1, torch.nan], [0.1, 3.0]], dtype=torch.float64)
    assert not GDPO().teaches(silent[:, 0], Objectives(silent, weights))


def test_pass_rate_by_hand():
    curriculum = Curriculum(decay=0.75)
    rate = None
    for share, expected in [(0.5, 0.5), (1.0, 0.625), (0.0, 0.46875)]:
        rate = curriculum.moved(rate, share)
        assert rate == expected


@pytest.mark.parametrize(
    ("rate", "rests"), [(0.0, True), (0.1, True), (0.11, False), (0.89, False), (0.9, True), (1.0, True)]
)
def test_prompt_rests_at_a_bound(rate, rests):
    assert Curriculum(low=0.1, high=0.9).rests(rate) == rests


def test_dapo_alone_samples_dynamically():
    assert DAPO().dynamic_sampling == DynamicSampling()
    assert Algorithm().dynamic_sampling is None


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DynamicSampling(batches=0), "batches"),
        (lambda: Curriculum(decay=1.0), "decay"),
        (lambda: Curriculum(low=0.5, high=0.5), "low"),
        (lambda: Curriculum(high=1.5), "high"),
        (lambda: Curriculum(rest=0), "rest"),
        (lambda: Curriculum(solved=float("nan")), "solved"),
    ],
)
def test_impossible_settings_are_refused(make, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        make()
