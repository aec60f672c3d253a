"""A run whose responses or tokens are masked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from lightning_rlhf.core import (
    Algorithm,
    ConstantSchedule,
    DPPOMask,
    GroupAdvantage,
    LossMask,
    MaskTruncated,
    OffPolicyMask,
    SeqMeanTokenMean,
    SequenceLevel,
    TokenLevel,
    TopEntropy,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rollout import UpdateSchedule

ENDS = list(range(10))
RAGGED = [[2], [3, 4], [5, 6, 7], [8]]


@dataclass(frozen=True, kw_only=True)
class Nothing(LossMask):
    """Count no response."""

    def counted(self, rollout):
        return torch.zeros_like(rollout.response_mask)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.fixture
def trained(make_lm, make_trainer, left_padded, as_loader, recorder, token_reward):
    """A module after two rollouts, how far its weights went, and what was logged."""

    def run(**options):
        usual = {"beta": 0.0, "level": TokenLevel(), "advantage": GroupAdvantage(), "shaping": ()}
        module = PPOModule(
            policy=make_lm("gpt2", end=ENDS),
            reward=token_reward(),
            algorithm=Algorithm(**(usual | options)),
            generation=SamplingParams(max_new_tokens=4, samples_per_prompt=2),
            updates=UpdateSchedule(epochs=2, minibatch=4, microbatch=3),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule=ConstantSchedule(),
        )
        module.configure_model()
        before = weights(module)
        batch = {"prompts": left_padded(RAGGED)}
        make_trainer(callbacks=[recorder]).fit(module, as_loader([batch] * 2))
        return module, float((weights(module) - before).abs().max()), recorder.steps

    return run


@pytest.mark.parametrize("level", [TokenLevel(), SequenceLevel()], ids=repr)
@pytest.mark.parametrize("reduction", [SeqMeanTokenMean(), Algorithm().reduction], ids=repr)
def test_rollout_without_a_response_that_counts_moves_no_weight(trained, level, reduction):
    module, distance, steps = trained(masks=Nothing(), level=level, reduction=reduction)
    assert distance == 0.0
    assert all(math.isfinite(number) for step in steps for number in step.values())
    assert [step["objective/uncounted"] for step in steps] == [1.0, 1.0]
    assert torch.equal(module.outcome.advantages, torch.zeros(8, dtype=torch.float64))
    # negative control
    assert trained(level=level, reduction=reduction)[1] > 1e-5


def test_truncated_responses_count_in_no_loss_but_in_every_observation(trained):
    module, distance, steps = trained(masks=MaskTruncated())
    plain = trained()[2][2]  # the same recorder: the first rollout without masks
    assert 0 < steps[0]["objective/eos_rate"] < 1
    assert steps[0]["objective/uncounted"] == pytest.approx(1 - steps[0]["objective/eos_rate"], abs=1e-12)
    assert steps[0]["policy/masked"] == 0.0
    for name in ("objective/response_length", "objective/scores", "objective/eos_rate", "policy/entropy_avg"):
        assert steps[0][name] == pytest.approx(plain[name], abs=1e-12)
    assert steps[0]["loss/policy_avg"] != plain["loss/policy_avg"]
    assert "policy/masked" not in plain
    assert "objective/uncounted" not in plain
    truncated = ~module.outcome.rollout.ended
    assert module.outcome.advantages[truncated].eq(0).all()
    assert distance > 1e-5


def test_share_of_masked_tokens_is_logged(trained):
    *_, steps = trained(masks=TopEntropy(share=0.25))
    tokens = 8 * steps[0]["objective/response_length"]
    kept = 1 + math.floor(0.25 * (tokens - 1))
    assert steps[0]["policy/masked"] == pytest.approx(1 - kept / tokens, abs=1e-9)


def test_masks_of_the_ratio_drop_nothing_before_the_policy_moves(trained):
    *_, steps = trained(masks=[DPPOMask(threshold=1e-9), OffPolicyMask(threshold=1e-9)])
    assert 0 < steps[0]["policy/masked"] < 0.75  # of four updates, one at π_old
    *_, steps = trained(masks=[DPPOMask(threshold=0.9), OffPolicyMask(threshold=9.0)])
    assert steps[2]["policy/masked"] == 0.0
