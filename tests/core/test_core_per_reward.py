"""Advantages per reward by hand, MaxRL's expected gradient by enumeration, running normalization of scores."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_rlhf.core import (
    GAE,
    GDPO,
    Algorithm,
    BanditAdvantage,
    GroupAdvantage,
    GroupMean,
    KLInLoss,
    LeaveOneOut,
    LengthPenalty,
    MaxRL,
    NoScale,
    PerReward,
    RunningMean,
    RunningNormalized,
    TokenLevel,
    local,
)
from lightning_rlhf.types import Objectives, Rollout

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
ONE = torch.ones(6, 1, dtype=torch.bool)


def rollout_of(count: int, width: int = 2) -> Rollout:
    numbers = torch.zeros(count, width, dtype=torch.float64)
    real = torch.ones(count, width, dtype=torch.bool)
    return Rollout(
        tokens=torch.zeros(count, width + 1, dtype=torch.int64),
        attention_mask=torch.ones(count, width + 1, dtype=torch.bool),
        response_mask=real,
        ended=torch.ones(count, dtype=torch.bool),
        prompt_index=GROUPS[:count],
        logprobs=numbers,
        sampler_logprobs=numbers,
        ref_logprobs=numbers,
        entropy=numbers,
        values=numbers,
    )


# Per reward


def test_each_part_is_estimated_alone_and_weighed_afterwards():
    first = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    second = torch.tensor([0.0, 50.0, 100.0, 7.0, 7.0, 7.0], dtype=torch.float64)
    parts, weights = torch.stack([first, second]).unsqueeze(2), torch.tensor([2.0, 0.01], dtype=torch.float64)
    plain = PerReward(estimator=GroupAdvantage(scale=NoScale()), scale=NoScale())
    found = plain.summed(parts, weights, ONE, groups=GROUPS, all_sum=local).advantages.squeeze(1)
    centered = torch.tensor([0.0, -1.0, 1.0, -1.0, -1.0, 2.0]), torch.tensor([-50.0, 0.0, 50.0, 0.0, 0.0, 0.0])
    assert found.tolist() == pytest.approx((2.0 * centered[0] + 0.01 * centered[1]).tolist())


def test_response_without_a_score_takes_no_part():
    scores = torch.tensor([1.0, 0.0, 2.0, torch.nan, torch.nan, torch.nan], dtype=torch.float64)
    found = PerReward(estimator=GroupAdvantage(scale=NoScale()), scale=NoScale()).summed(
        scores.view(1, 6, 1), torch.ones(1, dtype=torch.float64), ONE, groups=GROUPS, all_sum=local
    )
    assert found.advantages.squeeze(1).tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]


def test_response_that_a_part_scores_alone_is_left_out():
    """Of its group the part has no other score to compare with."""
    scores = torch.tensor([1.0, 0.0, 2.0, torch.nan, 5.0, torch.nan], dtype=torch.float64)
    found = PerReward(estimator=GroupAdvantage(scale=NoScale()), scale=NoScale()).summed(
        scores.view(1, 6, 1), torch.ones(1, dtype=torch.float64), ONE, groups=GROUPS, all_sum=local
    )
    assert found.advantages.squeeze(1).tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, 0.0]


def test_part_that_no_response_has_a_score_for():
    scores = torch.full((1, 6, 1), torch.nan, dtype=torch.float64)
    found = PerReward().summed(scores, torch.ones(1, dtype=torch.float64), ONE, groups=GROUPS, all_sum=local)
    assert not found.advantages.any()


def test_what_shaping_adds_is_one_more_part():
    scores = torch.tensor([[1.0, 4.0], [0.0, 5.0], [2.0, 9.0], [0.0, 1.0], [0.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    algorithm = GDPO(shaping=LengthPenalty(coef=0.1), level=TokenLevel())
    rollout, lengths = rollout_of(6), torch.tensor([1, 2, 3, 1, 2, 3])
    shaped = algorithm.shaped(scores @ weights, lengths=lengths, ended=rollout.ended)
    found = algorithm.credit(rollout, shaped, local, Objectives(scores, weights)).advantages[:, 0]
    parts = torch.cat([scores, (-0.1 * lengths.double()).unsqueeze(1)], 1).T.unsqueeze(2)
    whole = torch.cat([weights, torch.ones(1, dtype=torch.float64)])
    expected = PerReward().summed(parts, whole, ONE, groups=GROUPS, all_sum=local).advantages.squeeze(1)
    assert torch.allclose(found, expected, atol=1e-12)
    plain = GDPO().credit(rollout, scores @ weights, local, Objectives(scores, weights)).advantages[:, 0]
    assert not torch.allclose(found, plain, atol=1e-3)


def test_reward_without_parts_is_its_only_part():
    scores = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 3.0], dtype=torch.float64)
    alone = GDPO().credit(rollout_of(6), scores).advantages
    part = GDPO().credit(
        rollout_of(6), scores, local, Objectives(scores.unsqueeze(1), torch.ones(1, dtype=torch.float64))
    )
    assert torch.allclose(alone, part.advantages, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PerReward(estimator=GAE()), "GAE"),
        (lambda: PerReward(estimator=BanditAdvantage(baseline=RunningMean())), "memory"),
        (lambda: Algorithm(advantage=PerReward(), beta=0.1), "kl_term"),
        (lambda: GDPO(shaping=[RunningNormalized()]), "RunningNormalized"),
    ],
)
def test_what_has_no_part_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
    assert Algorithm(advantage=PerReward(), beta=0.1, kl_term=KLInLoss()).advantage.needs_group


# MaxRL


def test_maxrl_by_hand():
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = MaxRL().credit(rollout_of(6), scores).advantages[:, 0]
    assert found.tolist() == pytest.approx([2.0, -1.0, -1.0, 0.0, 0.0, 0.0])


def test_maxrl_refuses_scores_below_zero():
    with pytest.raises(ValueError, match="GroupMean"):
        MaxRL().credit(rollout_of(6), torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_expected_gradient_of_maxrl_is_that_of_the_truncated_likelihood(k):
    """E over all k-tuples of responses of mean Â·∇log π = ∇ Σ_{j<k} pass@j / j, exactly; RLOO's is ∇ pass@1."""
    logits = torch.tensor([0.3, -0.5, 0.9, -1.2], dtype=torch.float64, requires_grad=True)
    solved = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    policy = logits.softmax(0)
    slopes = torch.stack([torch.autograd.grad(p, logits, retain_graph=True)[0] for p in logits.log_softmax(0)])
    rate = (policy * solved).sum()
    ideal = sum((1 - (1 - rate) ** j) / j for j in range(1, k))
    groups, mask = torch.zeros(k, dtype=torch.int64), torch.ones(k, 1, dtype=torch.bool)

    def expected(estimator):
        total = torch.zeros_like(logits)
        for responses in itertools.product(range(4), repeat=k):
            chosen = torch.tensor(responses)
            rewards = solved[chosen].unsqueeze(1)
            credit = estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=local)
            total = total + policy[chosen].prod().detach() * (credit.advantages * slopes[chosen]).mean(0)
        return total

    found = expected(GroupAdvantage(scale=GroupMean()))
    assert torch.allclose(found, torch.autograd.grad(ideal, logits, retain_graph=True)[0], atol=1e-12)
    first = torch.autograd.grad(rate, logits)[0]
    assert torch.allclose(expected(BanditAdvantage(baseline=LeaveOneOut())), first, atol=1e-12)
    if k > 2:
        assert not torch.allclose(found, first, atol=1e-3)


# Running normalization


def test_statistics_are_those_of_all_scores_before():
    generator, rule = torch.Generator().manual_seed(0), RunningNormalized()
    lengths, ended, seen = torch.ones(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool), []
    for _ in range(4):
        scores = 100 + 7 * torch.randn(5, generator=generator, dtype=torch.float64)
        found = rule(scores, lengths=lengths, ended=ended)
        if seen:
            past = torch.cat(seen)
            assert torch.allclose(found, (scores - past.mean()) / past.std(), atol=1e-6)
        else:
            assert torch.equal(found, scores)
        rule = rule.adapted(float(scores.mean()), float(scores.var(correction=0)), 5)
        seen.append(scores)
    assert not torch.allclose(rule(scores, lengths=lengths, ended=ended).mean(), scores.mean(), atol=1.0)


def test_mean_may_stay():
    rule = RunningNormalized(center=False, mean=100.0, squares=4.0 * 9, count=10)
    scores = torch.tensor([50.0], dtype=torch.float64)
    assert float(rule(scores, lengths=torch.ones(1), ended=torch.ones(1))) == pytest.approx(25.0)


def test_it_comes_first():
    with pytest.raises(ValueError, match="first"):
        Algorithm(shaping=[LengthPenalty(coef=0.1), RunningNormalized()])
    assert Algorithm(shaping=[RunningNormalized(), LengthPenalty(coef=0.1)]).rules[0] == RunningNormalized()
