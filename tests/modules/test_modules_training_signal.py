"""Rollouts from which nothing is learned are told, once."""

from __future__ import annotations

import logging

import pytest
from gathered import gathered

from lightning_rlhf.core import (
    Algorithm,
    BanditAdvantage,
    BatchMean,
    FixedKL,
    GroupAdvantage,
    TokenLevel,
    TruncatedScore,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import LearnedReward, TimedReward, WeightedReward

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]


def varied(prompts, responses):
    return [0.25 + 0.5 * number for number, _ in enumerate(responses)]


def constant(prompts, responses):
    return [2.0 for _ in responses]


def nothing(prompts, responses):
    return [0.0 for _ in responses]


@pytest.fixture
def told(make_lm, toy_tokenizer, make_trainer, as_loader, left_padded, caplog):
    """Warnings of three rollouts, and what was logged of the last."""

    def run(*, end=35, **options) -> tuple[list[str], dict[str, float]]:
        usual = {"generation": SamplingParams(max_new_tokens=2), "beta": FixedKL(coef=0.0)}
        module = PPOModule(make_lm(end=end).double(), **gathered(tokenizer=toy_tokenizer, **usual | options))
        trainer = make_trainer()
        with caplog.at_level(logging.WARNING, logger="lightning_rlhf"):
            trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 3))
        said = [record.getMessage() for record in caplog.records if "said once a run" in record.getMessage()]
        return said, {name: float(value) for name, value in trainer.callback_metrics.items()}

    return run


def test_scores_that_shaping_made_alike_are_told_with_what_the_reward_gave(told):
    said, logged = told(reward=varied, shaping=[TruncatedScore()])
    assert len(said) == 1
    assert "all 4 responses reached `generation.max_new_tokens`=2" in said[0]
    assert "made each score -1; the reward itself gave 0.25 to 1.75" in said[0]
    assert logged["objective/raw_scores"] == pytest.approx(1.0)
    assert logged["objective/scores"] == -1.0


def test_flat_groups_are_told(told):
    said, _ = told(
        reward=constant,
        advantage=GroupAdvantage(),
        level=TokenLevel(),
        generation=SamplingParams(max_new_tokens=2, samples_per_prompt=2),
    )
    assert len(said) == 1
    assert "all responses to each prompt scored alike (2 to 2 over the 8 responses)" in said[0]


def test_advantages_of_nothing_are_told(told):
    assert "the advantages of all 4 responses are 0 (scores 0 to 0)" in told(reward=nothing)[0][0]


@pytest.mark.parametrize(
    "options",
    [
        {"reward": varied},
        {"reward": constant},
        {"reward": varied, "shaping": [TruncatedScore()], "end": list(range(30))},
        {"reward": varied, "advantage": BanditAdvantage(baseline=BatchMean())},
    ],
)
def test_signal_is_no_reason_to_warn(told, options):
    assert told(**options)[0] == []


def test_default_shaping_is_that_of_the_reward(make_folder, make_lm, toy_tokenizer):
    """−1 is a low score where demonstrations have 0, and may be a high one elsewhere."""
    learned = LearnedReward(make_folder(scorer=True))
    policy = ModelSource(path=make_folder())
    for reward in (learned, TimedReward(learned), WeightedReward({"learned": learned, "short": varied})):
        assert PPOModule(policy, reward).algorithm.shaping == (TruncatedScore(),)
    assert PPOModule(policy, varied).algorithm.shaping == ()
    assert PPOModule(policy, learned, algorithm=Algorithm(shaping=[])).algorithm.shaping == ()
