"""None from a reward is "not my task": who sums what, what is logged, and when it is an error."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.evaluation.evaluation import observed_parts
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics
from lightning_rlhf.rewards import EnsembleReward, Reward, TextReward, TimedReward, WeightedReward, as_reward
from lightning_rlhf.rewards.errors import RewardError, scored_or_told

ROWS = [{"prompt": "a", "task": "sum"}, {"prompt": "b", "task": "poem"}, {"prompt": "c", "task": "sum"}]


def sums(prompts, responses, task):
    return [2.0 if each == "sum" else None for each in task]


def poems(prompts, responses, task):
    return [None if each == "sum" else -1.0 for each in task]


def everywhere(prompts, responses):
    return [0.5, 0.25, 0.125]


class Abstaining(TextReward):
    def score(self, prompts, responses, **columns):
        return [None] * len(responses)


@pytest.fixture
def rollout(make_rollout):
    return make_rollout([[10], [11], [12]], [[13, 0], [14], [15, 0]])


@pytest.fixture
def ask(rollout, toy_tokenizer, tmp_path):
    """Scores as the trainer gets them, of this process; `others` is whether all other processes succeeded."""

    def asked(reward, *, others: bool = True):
        reward = as_reward(reward)
        reward.prepare(toy_tokenizer)
        place = {"agreed": lambda fine: fine and others, "iteration": 7, "run": tmp_path}
        return scored_or_told(reward, rollout, ROWS, **place)

    return asked


def test_sum_is_over_the_rewards_that_answered(ask):
    parts = {"sums": sums, "poems": poems, "everywhere": everywhere}
    scores = ask(WeightedReward(parts, {"sums": 10.0, "poems": 3.0, "everywhere": 1.0}))
    assert scores.total.tolist() == [20.5, -2.75, 20.125]
    assert [x if x == x else None for x in scores.parts["sums"].tolist()] == [2.0, None, 2.0]
    assert [x if x == x else None for x in scores.parts["poems"].tolist()] == [None, -1.0, None]


def test_part_of_weight_zero_that_is_silent_adds_nothing(ask):
    scores = ask(WeightedReward({"a": sums, "b": everywhere}, {"a": 0.0, "b": 1.0}))
    assert scores.total.tolist() == [0.5, 0.25, 0.125]


def test_nested_and_timed_rewards_pass_it_on(ask):
    inner = WeightedReward({"sums": sums, "silent": Abstaining()})
    scores = ask(WeightedReward({"inner": TimedReward(inner, seconds=60.0), "poems": poems}))
    assert scores.total.tolist() == [2.0, -1.0, 2.0]
    assert scores.parts["inner"].isnan().tolist() == [False, True, False]
    assert scores.parts["inner/silent"].isnan().all()


@pytest.mark.parametrize(
    ("reward", "first"),
    [
        (sums, 1),
        (poems, 0),
        (Abstaining(), 0),
        (WeightedReward({"sums": sums, "silent": Abstaining()}), 1),
        (EnsembleReward([sums, sums]), 1),
    ],
    ids=["function", "another", "class", "sum", "ensemble"],
)
def test_response_without_any_score_is_an_error_that_names_the_row(ask, reward, first):
    with pytest.raises(RewardError, match=rf"no score for response {first}.*WeightedReward.*{ROWS[first]['task']}"):
        ask(reward)


def test_silence_elsewhere_fails_every_process(ask):
    with pytest.raises(RewardError, match="another process"):
        ask(everywhere, others=False)


def test_ensemble_of_members_that_disagree_on_whose_task_it_is_is_refused(ask):
    with pytest.raises(RewardError, match="member_0 returned None for response 1"):
        ask(EnsembleReward([sums, everywhere]))


def test_nan_that_was_returned_as_a_number_stays_refused(ask):
    """Also beside a None, and from a `Reward` that checks nothing, in a sum with others."""

    class Careless(Reward):
        def __call__(self, rollout, rows):
            return torch.tensor([1.0, math.nan, 1.0])

    with pytest.raises(RewardError, match="nan for response 1"):
        ask(WeightedReward({"a": lambda prompts, responses: [None, math.nan, 1.0], "b": everywhere}))
    with pytest.raises(RewardError, match="nan for response 1"):
        ask(WeightedReward({"a": Careless(), "b": everywhere}))


def test_mean_of_a_part_is_over_the_rows_it_answered(ask):
    scores = ask(WeightedReward({"sums": sums, "everywhere": everywhere}))
    means = observed_parts(scores, score="reward").means(lambda x: x)
    assert means == {"reward/sums": 2.0, "reward/everywhere": pytest.approx(0.875 / 3)}
    real = torch.tensor([True, True, False])
    assert observed_parts(scores, mask=real).means(lambda x: x)["scores/everywhere"] == pytest.approx(0.375)


def test_part_that_no_process_answered_has_no_mean_and_one_that_another_did_has_its_own(ask):
    scores = ask(WeightedReward({"silent": Abstaining(), "everywhere": everywhere}))
    metrics = observed_parts(scores) + MeanMetrics.of({"other": torch.ones(2)}, torch.zeros(2, dtype=torch.bool))
    assert metrics.means(lambda x: x) == {"other": 0.0, "scores/everywhere": pytest.approx(0.875 / 3)}
    answered_elsewhere = torch.tensor([[0.0, 0.0], [0.0, 0.0], [6.0, 2.0]], dtype=torch.float64)  # by sorted name
    assert metrics.means(lambda x: x + answered_elsewhere)["scores/silent"] == 3.0
