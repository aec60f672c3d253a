"""Episodes in training and evaluation: what fails is not learned from, and what does not go together is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_rlhf import BestOfN, PPOModule, SamplingParams, WinRate
from lightning_rlhf.core import (
    GRPO,
    Algorithm,
    BanditAdvantage,
    ConstantSchedule,
    LeaveOneOut,
    RewardToGo,
    SeqMeanTokenSum,
    SpanLevel,
)
from lightning_rlhf.engines import VLLMServer
from lightning_rlhf.environments import Done, Environment, Reply
from lightning_rlhf.rewards import EnvironmentReward, Scores
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.rollout.scored import without_failed
from lightning_rlhf.types import PromptBatch

ENDS = list(range(10))
PROMPTS = [[12, 13, 14], [10], [11, 15]]


class Falls(Environment):
    """Cannot be opened for the rows that say so, for some by the seed; answers twice and pays."""

    def reset(self, row):
        self.turns, self.row = 0, row
        if row["when"] == "opened":
            self.fall()

    def fall(self):
        if self.row["falls"] is True or self.seed % 3 == self.row["falls"]:
            raise OSError("no table")

    def step(self, text, tool_calls):
        self.fall()
        self.turns += 1
        return Done(float(len(text))) if self.turns == 3 else Reply(" x", 0.5)


class Biased(EnvironmentReward):
    """More for what failed."""

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def __call__(self, rollout, rows):
        return super().__call__(rollout, rows) + self.bias * rollout.failed


@pytest.fixture
def batch(left_padded) -> PromptBatch:
    return left_padded(
        PROMPTS, rows=[{"prompt": "c d e", "falls": True if i == 0 else None, "when": "opened"} for i in range(3)]
    )


@pytest.fixture
def make_module(make_lm, toy_tokenizer):
    def make(**options) -> PPOModule:
        usual = {
            "policy": make_lm(end=ENDS).double(),
            "reward": EnvironmentReward(),
            "tokenizer": toy_tokenizer,
            "generation": SamplingParams(max_new_tokens=4, samples_per_prompt=3),
            "environment": Episodes(factory=Falls, tokens=24, failures=0.5),
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "schedule": ConstantSchedule(),
        }
        return PPOModule(**(usual | options))

    return make


ALGORITHMS = {
    "bandit": Algorithm(),
    "leave_one_out": Algorithm(advantage=BanditAdvantage(baseline=LeaveOneOut())),
    "grpo": GRPO(),
    "spans": Algorithm(level=SpanLevel(), advantage=RewardToGo(), reduction=SeqMeanTokenSum()),
}


@pytest.mark.parametrize("when", ["opened", "asked"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_fails_is_not_learned_from(make_module, make_trainer, as_loader, batch, recorder, algorithm, when):
    """No number of a failed episode reaches the gradient: the update is the same whatever its score."""
    weights = []
    for bias in (0.0, 100.0):
        module = make_module(algorithm=ALGORITHMS[algorithm], reward=Biased(bias))
        rows = [{"prompt": "c d e", "falls": falls, "when": when} for falls in (1, 2, None)]
        make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": batch._replace(rows=rows)}] * 2))
        weights.append(torch.cat([p.detach().flatten() for p in module.policy.parameters()]))
        failed = module.outcome.rollout.failed
        assert recorder.steps[-1]["objective/failed"] == pytest.approx(float(failed.double().mean()))
        assert 0 < int(failed[:6].sum()) < 6
        assert not module.outcome.advantages[failed].any()
        assert module.outcome.advantages[~failed].any()
    assert weights[0].isfinite().all()
    assert torch.equal(*weights)


@pytest.mark.parametrize("algorithm", ["leave_one_out", "grpo"])
def test_baseline_is_that_of_the_episodes_that_did_not_fail(make_module, batch, algorithm):
    """Whether the failed one has a turn or none: the mean of the group is that of the others."""
    module = make_module(algorithm=replace(ALGORITHMS[algorithm], beta=0.0))
    module.configure_model()
    rows = [{"prompt": "c d e", "falls": None, "when": "opened"}] * 3
    rollout = module.responder.collect(batch._replace(rows=rows), samples=3, iteration=0)
    scores = torch.tensor([90.0, 2.0, 5.0] * 3, dtype=torch.float64)
    failed = torch.tensor([True, False, False] * 3)
    mask = rollout.response_mask & (torch.arange(9) != 3).unsqueeze(1)
    rollout = replace(rollout, failed=failed, response_mask=mask, rewards=torch.zeros_like(rollout.logprobs))
    total = without_failed(rollout, scores)
    experience = module.credit(rollout, Scores(total, {}))
    others = experience.advantages[~failed].sum(1) / experience.action_mask[~failed].sum(1)
    whole = {"leave_one_out": [-2.25, 2.25], "grpo": [-1.5 / (1.5 + 1e-4), 1.5 / (1.5 + 1e-4)]}[algorithm]
    torch.testing.assert_close(others, torch.tensor(whole * 3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_score_of_a_failed_episode_is_that_of_the_others_of_its_group(make_module, batch):
    module = make_module()
    module.configure_model()
    rollout = module.responder.collect(batch, samples=3, iteration=0)
    failed = torch.tensor([True, False, False, False, False, False, True, True, True])
    scores = torch.tensor([50.0, 2.0, 4.0, 1.0, 1.0, 7.0, 50.0, 50.0, 50.0])
    expected = torch.tensor([3.0, 2.0, 4.0, 1.0, 1.0, 7.0, 3.0, 3.0, 3.0])  # of the last group all failed: 15 / 5
    assert torch.equal(without_failed(replace(rollout, failed=failed), scores), expected)
    assert torch.equal(without_failed(replace(rollout, failed=~failed | failed), scores), torch.zeros(9))
    assert without_failed(replace(rollout, failed=None), scores) is scores


def test_what_fails_does_not_count_in_an_evaluation(make_module, make_trainer, as_loader, batch):
    module = make_module()
    (numbers,) = make_trainer().validate(module, as_loader([batch]), verbose=False)
    assert numbers["eval/failed"] == pytest.approx(1 / 3)
    assert numbers["eval/turns"] >= 1
    whole = make_trainer().validate(make_module(), as_loader([batch]), verbose=False)[0]["eval/reward"]
    assert numbers["eval/reward"] == whole
    well = batch._replace(is_real=torch.tensor([False, True, True]))
    (others,) = make_trainer().validate(make_module(), as_loader([well]), verbose=False)
    assert others["eval/reward"] == pytest.approx(numbers["eval/reward"], rel=1e-6)
    assert others["eval/failed"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"environment": None}, "`EnvironmentReward` is what an environment gives, and there is none"),
        ({"engine": VLLMServer(urls=["http://localhost:1"], overlap=True)}, "draws single responses ahead"),
        ({"evaluations": [WinRate()]}, "win_rate compare with responses of the reference"),
        ({"evaluations": [BestOfN()]}, "compare with responses of the reference"),
    ],
)
def test_what_does_not_go_together_is_refused(make_module, options, said):
    with pytest.raises(ValueError, match=said):
        make_module(**options)


def test_policy_without_tokenizer_is_refused(make_module):
    module = make_module(tokenizer=None)
    with pytest.raises(ValueError, match="the policy has no tokenizer"):
        module.configure_model()
