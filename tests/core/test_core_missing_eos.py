import pytest
import torch

from lightning_rlhf.core import ReplaceScore, SubtractFromScore

ENDED = torch.tensor([True, False, True, False])


def test_replace_score_sets_the_value_and_leaves_ended_responses(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert torch.equal(ReplaceScore()(scores, ENDED), float64([1.0, -1.0, -3.0, -1.0]))
    assert torch.equal(ReplaceScore(value=0.5)(scores, ENDED), float64([1.0, 0.5, -3.0, 0.5]))


def test_subtract_from_score_lowers_by_the_penalty(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert torch.equal(SubtractFromScore()(scores, ENDED), float64([1.0, 1.0, -3.0, -5.0]))
    assert torch.equal(SubtractFromScore(penalty=0.5)(scores, ENDED), float64([1.0, 1.5, -3.0, -4.5]))
    assert torch.equal(SubtractFromScore(penalty=0.0)(scores, ENDED), scores)


def test_replace_score_hides_what_the_reward_said_of_a_cut_response(float64):
    # the reward of a cut response may be anything; of an ended one it shows
    assert torch.equal(ReplaceScore()(float64([1.0, float("nan"), 2.0, 9.0]), ENDED), float64([1.0, -1.0, 2.0, -1.0]))
    assert ReplaceScore()(float64([float("nan"), 0.0, 0.0, 0.0]), ENDED)[0].isnan()


@pytest.mark.parametrize("rule", [ReplaceScore(), SubtractFromScore()])
def test_missing_eos_keeps_dtype(rule):
    for dtype in (torch.float32, torch.float64):
        assert rule(torch.zeros(4, dtype=dtype), ENDED).dtype == dtype


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_subtract_from_score_refuses_a_bonus(bad):
    with pytest.raises(ValueError, match="`penalty` must be a number of at least 0: got"):
        SubtractFromScore(penalty=bad)
