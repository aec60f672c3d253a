"""Responses in several spans: what an environment wrote between them is no action, takes no step and gets no reward."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.core import (
    GAE,
    Algorithm,
    BanditAdvantage,
    KLInReward,
    RewardToGo,
    SequenceLevel,
    SpanLevel,
    TokenLevel,
)
from lightning_rlhf.core.kl_term import penalized_rewards
from lightning_rlhf.types import Rollout

MASK = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 1, 0],
        [1, 0, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0, 0, 0],  # an observation stands before the first span
    ]
).bool()
SPANS = [[(0, 2), (4, 7)], [(0, 1), (2, 3), (5, 6)], [(0, 3)], [(1, 3), (4, 5)]]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
V = torch.randn(4, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LEVEL = SpanLevel()


def by_span(of):
    """A number for each span at its last token, by a loop."""
    table = torch.zeros(4, 8, dtype=torch.float64)
    for row, spans in enumerate(SPANS):
        for start, stop in spans:
            table[row, stop - 1] = of(row, start, stop)
    return table


def test_a_span_is_one_action_at_its_last_token():
    assert torch.equal(LEVEL.mask(MASK), by_span(lambda *_: 1.0).bool())
    torch.testing.assert_close(LEVEL.total(X, MASK), by_span(lambda i, a, b: X[i, a:b].sum()), rtol=0, atol=1e-14)
    assert torch.equal(LEVEL.state_value(V, MASK), by_span(lambda i, a, b: V[i, a]))
    assert torch.equal(LEVEL.log_ratio(X, V, MASK), LEVEL.total(X - V, MASK))


def test_spread_over_a_span_is_undone_by_its_total():
    action = by_span(lambda i, a, b: X[i, b - 1])
    spread = LEVEL.spread(action, MASK)
    expected = torch.zeros_like(spread)
    for row, spans in enumerate(SPANS):
        for start, stop in spans:
            expected[row, start:stop] = X[row, stop - 1] / (stop - start)
    torch.testing.assert_close(spread, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(LEVEL.total(spread, MASK), action, rtol=0, atol=1e-15)


def test_one_span_is_the_whole_response():
    whole = MASK[2:3]
    alone, bandit = (level.total(X[2:3], whole) for level in (LEVEL, SequenceLevel()))
    assert torch.equal(alone[:, 2:3], bandit)
    assert torch.equal(LEVEL.state_value(V[2:3], whole)[:, 2:3], SequenceLevel().state_value(V[2:3], whole))


def test_gradient_of_a_span_is_of_its_own_tokens():
    x = X.clone().requires_grad_()
    LEVEL.total(x, MASK)[0, 6].backward()
    assert torch.equal(x.grad[0], torch.tensor([0, 0, 0, 0, 1, 1, 1, 0.0], dtype=torch.float64))
    assert not x.grad[1:].any()


@pytest.mark.parametrize("estimator", [GAE(gamma=0.9, lam=0.8), GAE(), RewardToGo(gamma=0.9)], ids=repr)
def test_actions_around_a_hole_follow_each_other(estimator):
    """As if what the environment wrote were cut out of the row."""
    rewards = torch.where(MASK, X, 0.0)
    found = estimator(rewards, V, MASK, groups=torch.arange(4), all_sum=lambda x: x)
    for row in range(4):
        real = MASK[row]
        cut = estimator(
            X[row, real][None], V[row, real][None], real[real][None], groups=torch.zeros(1), all_sum=lambda x: x
        )
        assert torch.equal(found.advantages[row, real], cut.advantages[0])
        assert torch.equal(found.returns[row, real], cut.returns[0])
        assert not found.advantages[row, ~real].any()
        assert not found.returns[row, ~real].any()


def test_the_score_stands_on_the_last_action_and_what_was_given_before_stays():
    scores, given = torch.tensor([3.0, 5.0, 7.0, 2.0]).double(), by_span(lambda i, a, b: float(i + a))
    rewards = penalized_rewards(scores, torch.zeros_like(X), LEVEL.mask(MASK), coef=0.0, given=given)
    expected = given.clone()
    for row, last in enumerate([6, 5, 2, 4]):
        expected[row, last] = 0.0
        expected[row, last] = scores[row] - expected[row].sum()
    assert torch.equal(rewards, expected)
    assert torch.equal(rewards.sum(1), scores)
    alone = penalized_rewards(scores, torch.zeros_like(X), LEVEL.mask(MASK), coef=0.0)
    assert torch.equal(alone.sum(1), scores)
    assert int((alone != 0).sum()) == 4


def rollout(rewards=None) -> Rollout:
    tokens = torch.arange(40).view(4, 10)
    real = torch.cat([torch.ones(4, 2, dtype=torch.bool), torch.arange(8) < torch.tensor([7, 6, 3, 5])[:, None]], 1)
    numbers = torch.where(MASK, -X.abs(), 0.0)
    return Rollout(
        tokens=tokens,
        attention_mask=real,
        response_mask=MASK,
        ended=torch.ones(4, dtype=torch.bool),
        prompt_index=torch.arange(4),
        logprobs=numbers,
        sampler_logprobs=numbers,
        ref_logprobs=2 * numbers,
        entropy=-numbers,
        values=V,
        rewards=rewards,
    )


@pytest.mark.parametrize("level", [SequenceLevel(), SpanLevel(), TokenLevel()], ids=repr)
def test_credit_of_a_dialogue_sums_to_the_bandit_s_reward(level):
    scores, beta = torch.tensor([3.0, 5.0, 7.0, 2.0]).double(), 0.3
    algorithm = Algorithm(level=level, beta=beta, kl_term=KLInReward(), advantage=BanditAdvantage())
    given = torch.where(MASK, X, 0.0)
    experience = algorithm.credit(rollout(given), scores)
    whole = scores - beta * torch.where(MASK, X.abs(), 0.0).sum(1)  # log π_old − log π_ref = |x| at each token
    torch.testing.assert_close(experience.rewards.sum(1), whole, rtol=0, atol=1e-13)
    advantages = torch.where(experience.action_mask, whole[:, None], 0.0)
    torch.testing.assert_close(experience.advantages, advantages, rtol=0, atol=1e-13)


def test_each_turn_gets_its_own_reward_to_go():
    given = by_span(lambda i, a, b: 1.0)
    algorithm = Algorithm(level=SpanLevel(), beta=0.0, advantage=RewardToGo())
    scores = torch.tensor([2.0, 3.0, 1.0, 2.0]).double()  # of every span 1
    experience = algorithm.credit(rollout(given), scores)
    spans = torch.tensor([2.0, 3.0, 1.0, 2.0])
    left = [experience.advantages[i][experience.action_mask[i]].tolist() for i in range(4)]
    assert left == [list(map(float, range(int(n), 0, -1))) for n in spans]


def test_cut_keeps_what_the_environment_wrote():
    whole = rollout()
    assert whole.extents.tolist() == [7, 6, 3, 5]
    assert whole.lengths.tolist() == [5, 3, 3, 3]
    part = whole.select(torch.tensor([2, 1]))
    assert part.response_mask.shape == (2, 6)
    assert torch.equal(part.tokens[1], whole.tokens[1, :8])


def test_the_answer_is_the_last_span():
    start, stop = rollout().last_span
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [spans[-1] for spans in SPANS]
