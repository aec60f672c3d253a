"""Every advantage estimator against the exact gradient of eq. 2, by summing over all batches that can be drawn.

Tabular bandits small enough to list: `Bandit` has prompts with one distribution over responses each, and a batch is k
responses to every prompt; `Sentences` has one prompt and responses of one or two tokens. J = E[r − β·log π/π_ref] and
its gradient are plain sums; an estimator's expected gradient is Σ over batches of probability · mean_i Âᵢ·∇log π(yᵢ|x).
"""

import math
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    GAE,
    BanditAdvantage,
    BatchMean,
    GroupAdvantage,
    GroupStd,
    LearnedValue,
    LeaveOneOut,
    NoBaseline,
    NoScale,
    RewardToGo,
    RunningMean,
    Whitened,
    local,
)

TIGHT = {"rtol": 0, "atol": 1e-9}
BETA = 0.4
NAMES = torch.tensor([12, -5])  # of the prompts: ids, not places


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apart(a, b):
    return float((a - b).abs().max())


# One action per response.


class Bandit(NamedTuple):
    """Log-probabilities of the policy and the reference, and scores, (prompts, responses) each."""

    logps: torch.Tensor
    reference: torch.Tensor
    scores: torch.Tensor

    @property
    def totals(self):
        return self.scores - BETA * (self.logps - self.reference)


def random_bandit(prompts, responses, seed):
    logits, other, scores = normal(3, prompts, responses, seed=seed)
    return Bandit(logits.log_softmax(1), other.log_softmax(1), scores)


def exact_gradient(bandit):
    """∇J with respect to the logits, J = the mean over prompts of Σ_y π·(r − β·log π/π_ref)."""
    logits = bandit.logps.clone().requires_grad_()
    logps = logits.log_softmax(1)
    objective = (logps.exp() * (bandit.scores - BETA * (logps - bandit.reference))).sum() / len(logits)
    return torch.autograd.grad(objective, logits)[0]


def direction(bandit, x, y):
    """∇log π(y|x) = e_y − π(·|x), in the row of x."""
    rows = torch.zeros_like(bandit.logps)
    rows[x] = -bandit.logps[x].exp()
    rows[x, y] += 1
    return rows


def batch_gradients(bandit, estimator, k, values=None):
    """Probability and gradient estimate of every batch of k responses to each prompt."""
    prompts, responses = bandit.logps.shape
    directions = torch.stack([direction(bandit, x, y) for x in range(prompts) for y in range(responses)])
    x = torch.arange(prompts).repeat(k)  # groups lie interleaved
    weights, gradients = [], []
    for drawn in product(range(responses), repeat=prompts * k):
        y = torch.tensor(drawn)
        rewards = bandit.totals[x, y].unsqueeze(1)
        v = torch.zeros_like(rewards) if values is None else values[x].unsqueeze(1)
        mask = torch.ones_like(rewards, dtype=torch.bool)
        advantages = estimator(rewards, v, mask, groups=NAMES[x], all_sum=local).advantages
        gradients.append((advantages.unsqueeze(2) * directions[x * responses + y]).mean(0))
        weights.append(bandit.logps[x, y].sum().exp())
    return torch.stack(weights), torch.stack(gradients)


def expected_gradient(bandit, estimator, k, values=None):
    weights, gradients = batch_gradients(bandit, estimator, k, values)
    return (weights.view(-1, 1, 1) * gradients).sum(0)


def total_variance(bandit, estimator, k, values=None):
    """Sum of the variances of the gradient's entries."""
    weights, gradients = batch_gradients(bandit, estimator, k, values)
    weights = weights.view(-1, 1, 1)
    mean = (weights * gradients).sum(0)
    return float((weights * (gradients - mean).square()).sum())


bandits = st.builds(
    lambda size, seed: (random_bandit(2, size[0], seed), size[1]),
    st.sampled_from([(3, 2), (2, 3)]),  # responses to choose from, k drawn
    st.integers(0, 2**31),
)


@given(bandits)
@settings(deadline=None, max_examples=10)
def test_the_enumeration_is_complete(case):
    bandit, k = case
    weights, _ = batch_gradients(bandit, BanditAdvantage(), k)
    assert abs(float(weights.sum()) - 1) <= 1e-12
    # ∇J by differences of J: 1e-7 is the error of a central difference at h = 1e-5
    h, x, y = 1e-5, 1, 0
    ends = []
    for sign in (1, -1):
        moved = bandit.logps.clone()
        moved[x, y] += sign * h
        moved = moved.log_softmax(1)
        ends.append(float((moved.exp() * (bandit.scores - BETA * (moved - bandit.reference))).sum() / 2))
    assert abs((ends[0] - ends[1]) / (2 * h) - float(exact_gradient(bandit)[x, y])) <= 1e-7


@given(bandits, st.floats(-20, 20), st.floats(0.1, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_baselines_that_do_not_know_the_response_are_unbiased(case, mean, weight, seed):
    # any number will do for the running mean, and any V(x) for the value
    bandit, k = case
    expected = exact_gradient(bandit)
    values = 5 * normal(2, seed=seed)
    for baseline in (NoBaseline(), LeaveOneOut(), RunningMean(mean=mean, weight=weight), LearnedValue()):
        got = expected_gradient(bandit, BanditAdvantage(baseline=baseline), k, values)
        assert_close(got, expected, **TIGHT)


def test_unbiased_baselines_give_the_gradient_and_not_another():
    # negative controls of the test above: it is not 0, nor that without the KL, nor that of a baseline which peeks
    bandit = random_bandit(2, 3, 1)
    expected = exact_gradient(bandit)
    assert expected.abs().max() > 0.05
    free = Bandit(bandit.logps, bandit.logps, bandit.scores)
    assert apart(expected_gradient(free, BanditAdvantage(), 2), expected) > 0.05
    assert apart(expected_gradient(bandit, GroupAdvantage(scale=NoScale()), 2), expected) > 0.02


@given(bandits)
@settings(deadline=None, max_examples=15)
def test_the_groups_mean_shrinks_the_gradient_by_one_over_k(case):
    # a response takes part in its own baseline: (k − 1)/k
    bandit, k = case
    got = expected_gradient(bandit, GroupAdvantage(scale=NoScale()), k)
    assert_close(got, (k - 1) / k * exact_gradient(bandit), **TIGHT)


@given(bandits)
@settings(deadline=None, max_examples=15)
def test_the_batch_mean_shrinks_the_gradient_by_one_over_n(case):
    # n = 2k responses to two prompts
    bandit, k = case
    got = expected_gradient(bandit, BanditAdvantage(baseline=BatchMean()), k)
    assert_close(got, (2 * k - 1) / (2 * k) * exact_gradient(bandit), **TIGHT)


@given(st.sampled_from([2, 3]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_many_groups_in_one_call_are_as_many_calls(k, seed):
    # all tuples of k responses to one prompt as the groups of one batch, rows shuffled, ids random
    bandit = random_bandit(1, 3, seed)
    tuples = torch.tensor(list(product(range(3), repeat=k)))
    generator = torch.Generator().manual_seed(seed)
    names = torch.randperm(10_000, generator=generator)[: len(tuples)] - 5000
    order = torch.randperm(tuples.numel(), generator=generator)
    y, groups = tuples.flatten()[order], names.repeat_interleave(k)[order]
    weights = bandit.logps[0][tuples].sum(1).exp().repeat_interleave(k)[order]
    rewards = bandit.totals[0][y].unsqueeze(1)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    directions = torch.stack([direction(bandit, 0, i) for i in y.tolist()])
    shares = {BanditAdvantage(baseline=LeaveOneOut()): 1.0, GroupAdvantage(scale=NoScale()): (k - 1) / k}
    for estimator, share in shares.items():
        advantages = estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=local).advantages
        got = (weights.view(-1, 1, 1) * advantages.unsqueeze(2) * directions).sum(0) / k
        assert_close(got, share * exact_gradient(bandit), **TIGHT)


def coin(*spreads):
    """Two responses to each prompt, even odds, scores 0 and the prompt's spread, π = π_ref."""
    even = torch.full((len(spreads), 2), 0.5, dtype=torch.float64).log()
    return Bandit(even, even, torch.tensor([[0.0, d] for d in spreads], dtype=torch.float64))


def test_group_std_is_not_the_gradient_where_spreads_differ():
    # ∇J = ½·(∓d/4) per prompt. With GroupStd a pair that differs has ±1/√2 whatever d: with probability ½ the mean of
    # ±1/√2·(±½) is 1/(2√2), so every prompt gets ½·(∓1/(4√2)): the easy prompt as much as the hard one
    bandit = coin(1.0, 10.0)
    assert_close(exact_gradient(bandit), torch.tensor([[-0.125, 0.125], [-1.25, 1.25]], dtype=torch.float64), **TIGHT)
    got = expected_gradient(bandit, GroupAdvantage(scale=GroupStd(guard=1e-12)), 2)
    share = 1 / (8 * math.sqrt(2))
    assert_close(got, torch.tensor([[-share, share]] * 2, dtype=torch.float64), **TIGHT)
    # not proportional: cosine (1 + 10)/(√2·√101) = 0.7740
    cosine = torch.cosine_similarity(got.flatten(), exact_gradient(bandit).flatten(), 0)
    assert_close(cosine, torch.tensor(11 / math.sqrt(202), dtype=torch.float64), **TIGHT)
    # with equal spreads it is; and Dr. GRPO is with any
    assert_close(expected_gradient(coin(4.0, 4.0), GroupAdvantage(scale=GroupStd(guard=1e-12)), 2), got, **TIGHT)
    plain = expected_gradient(bandit, GroupAdvantage(scale=NoScale()), 2)
    assert_close(plain, exact_gradient(bandit) / 2, **TIGHT)


def test_whitening_couples_responses_and_bends_the_gradient():
    # not even in direction; negative control of "unbiased", at a spread that the batch's unit varies with
    bandit = coin(1.0, 10.0)
    got = expected_gradient(bandit, Whitened(estimator=BanditAdvantage()), 2)
    assert torch.cosine_similarity(got.flatten(), exact_gradient(bandit).flatten(), 0) < 0.999
    assert torch.equal(got.sign(), exact_gradient(bandit).sign())


@given(bandits, st.floats(-20, 20), st.floats(-20, 20))
@settings(deadline=None, max_examples=10)
def test_a_number_per_prompt_in_the_reward_leaves_the_expected_gradient(case, first, second):
    # facts 4; sample by sample it is left only by centring per prompt
    bandit, k = case
    shift = torch.tensor([[first], [second]], dtype=torch.float64)
    shifted = bandit._replace(scores=bandit.scores + shift)
    for estimator in (BanditAdvantage(), BanditAdvantage(baseline=LeaveOneOut()), GroupAdvantage(scale=NoScale())):
        assert_close(expected_gradient(shifted, estimator, k), expected_gradient(bandit, estimator, k), **TIGHT)


# Variance.


def test_leave_one_out_has_less_variance_than_no_baseline():
    # even odds, scores 10 and 11, k = 2; entry of the second response, ∇log π = ±½:
    # no baseline: (1, 1) −5, (1, 2) ¼, (2, 2) 5.5: mean ¼, variance ¼·25 + ½/16 + ¼·30.25 − 1/16 = 13.78125
    # leave one out: 0, ½, 0: mean ¼, variance ½·¼ − 1/16 = 0.0625
    even = coin(1.0)
    bandit = even._replace(scores=even.scores + 10)
    plain, left_out = BanditAdvantage(), BanditAdvantage(baseline=LeaveOneOut())
    quarter = torch.tensor([[-0.25, 0.25]], dtype=torch.float64)
    for estimator, variance in ((plain, 13.78125), (left_out, 0.0625)):
        assert_close(expected_gradient(bandit, estimator, 2), quarter, **TIGHT)
        # both entries, which are opposite, count
        assert abs(total_variance(bandit, estimator, 2) - 2 * variance) <= 1e-9
    assert total_variance(bandit, left_out, 2) < total_variance(bandit, plain, 2) / 200
    # the mean reward itself as V(x): (1, 1) ¼, (1, 2) ¼, (2, 2) ¼, no variance at all
    values = torch.tensor([10.5], dtype=torch.float64)
    assert total_variance(bandit, BanditAdvantage(baseline=LearnedValue()), 2, values) <= 1e-12


@given(bandits, st.sampled_from([-10.0, 10.0]))
@settings(deadline=None, max_examples=15)
def test_baselines_pay_where_the_mean_reward_is_far_from_zero(case, offset):
    # |r − offset| ≤ 1, S = 1 − Σπ²: no baseline has at least (81 − 1)·S/k per prompt, leave one out at most 2²·S
    bandit, k = case
    bandit = bandit._replace(reference=bandit.logps, scores=offset + bandit.scores.tanh())
    plain = total_variance(bandit, BanditAdvantage(), k)
    for baseline in (LeaveOneOut(), RunningMean(mean=offset, weight=1.0)):
        assert total_variance(bandit, BanditAdvantage(baseline=baseline), k) < plain / 6
    # V(x) = E[r | x]
    values = (bandit.logps.exp() * bandit.scores).sum(1)
    assert total_variance(bandit, BanditAdvantage(baseline=LearnedValue()), k, values) < plain / 6
    # negative control: a baseline of the wrong sign makes it worse
    assert total_variance(bandit, BanditAdvantage(baseline=RunningMean(mean=-offset, weight=1.0)), k) > plain


# One action per token.

SENTENCES = [(0,), *product((1, 2), range(3))]  # token 0 ends a response, or its two tokens are full
TWO = torch.tensor([[True, len(y) == 2] for y in SENTENCES])
FIRST = torch.tensor([y[0] for y in SENTENCES])


class Sentences(NamedTuple):
    """Distribution of the first token and of the second after each first, (4, 3) logits, and scores, (7,)."""

    logits: torch.Tensor
    reference: torch.Tensor
    scores: torch.Tensor


def random_sentences(seed):
    logits, reference = normal(2, 4, 3, seed=seed)
    return Sentences(logits, reference, normal(7, seed=seed + 1))


def token_logps(logits):
    """log π of each token of each response, (7, 2), 0 after the end."""
    table = logits.log_softmax(1)
    rows = [(table[3, y[0]], table[y[0], y[1]] if len(y) == 2 else torch.zeros_like(table[3, 0])) for y in SENTENCES]
    return torch.stack([torch.stack(row) for row in rows])


def token_rewards(case):
    """−β·log π/π_ref of each token, and the score on the last."""
    rewards = -BETA * (token_logps(case.logits) - token_logps(case.reference))
    last = torch.stack([~TWO[:, 1], TWO[:, 1]], 1)
    return torch.where(TWO, rewards, 0.0) + torch.where(last, case.scores.unsqueeze(1), 0.0)


def exact_token_gradient(case):
    logits = case.logits.clone().requires_grad_()
    logps = token_logps(logits).sum(1)
    objective = (logps.exp() * (case.scores - BETA * (logps - token_logps(case.reference).sum(1)))).sum()
    return torch.autograd.grad(objective, logits)[0]


def token_directions(case):
    """∇log π of each token, (7, 2, 4, 3)."""
    policy = case.logits.softmax(1)
    rows = torch.zeros(7, 2, 4, 3, dtype=torch.float64)
    for i, y in enumerate(SENTENCES):
        rows[i, 0, 3] -= policy[3]
        rows[i, 0, 3, y[0]] += 1
        if len(y) == 2:
            rows[i, 1, y[0]] -= policy[y[0]]
            rows[i, 1, y[0], y[1]] += 1
    return rows


def expected_token_gradient(case, estimator, values=None):
    """Σ_y π(y)·Σ_t Âₜ·∇log π(yₜ|y_<t), all responses in one call."""
    rewards = token_rewards(case)
    values = torch.full_like(rewards, 77.0) if values is None else values
    advantages = estimator(rewards, values, TWO, groups=torch.arange(7), all_sum=local).advantages
    weights = token_logps(case.logits).sum(1).exp()
    return torch.einsum("i,it,itab->ab", weights, advantages, token_directions(case))


def true_values(case):
    """V of the first state, and of the state after each first token: what is still to be earned, on average."""
    rewards, policy = token_rewards(case), token_logps(case.logits).exp()
    after = torch.stack([(policy[:, 1] * rewards[:, 1])[(a == FIRST) & TWO[:, 1]].sum() for a in range(3)])
    start = (policy.prod(1) * rewards.sum(1)).sum()
    return torch.stack([start.expand(7), torch.where(TWO[:, 1], after[FIRST], 0.0)], 1)


def any_values(seed):
    """Any function of the state: one number at the start, one after each first token."""
    table = 3 * normal(4, seed=seed)
    return torch.stack([table[3].expand(7), table[FIRST]], 1)


sentences = st.builds(random_sentences, st.integers(0, 2**31))


@given(sentences)
@settings(deadline=None, max_examples=20)
def test_reward_to_go_and_the_spread_total_have_the_same_expected_gradient(case):
    expected = exact_token_gradient(case)
    assert_close(expected_token_gradient(case, RewardToGo()), expected, **TIGHT)
    assert_close(expected_token_gradient(case, BanditAdvantage()), expected, **TIGHT)


def test_reward_to_go_and_the_spread_total_differ_sample_by_sample():
    # negative control: equal in expectation only; the second token is spared the first one's KL
    case = random_sentences(4)
    rewards = token_rewards(case)
    settings = {"groups": torch.arange(7), "all_sum": local}
    to_go = RewardToGo()(rewards, torch.zeros_like(rewards), TWO, **settings).advantages
    spread = BanditAdvantage()(rewards, torch.zeros_like(rewards), TWO, **settings).advantages
    assert_close((spread - to_go)[:, 1], torch.where(TWO[:, 1], rewards[:, 0], 0.0), **TIGHT)
    assert apart(spread, to_go) > 0.05


@given(sentences, st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_gae_at_lambda_one_is_unbiased_with_any_value(case, seed):
    got = expected_token_gradient(case, GAE(gamma=1.0, lam=1.0), any_values(seed))
    assert_close(got, exact_token_gradient(case), **TIGHT)
    # so is V(x) alone, at either end
    got = expected_token_gradient(case, BanditAdvantage(baseline=LearnedValue()), any_values(seed))
    assert_close(got, exact_token_gradient(case), **TIGHT)


@given(sentences, st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_gae_with_the_true_value_is_unbiased_at_every_lambda(case, lam):
    got = expected_token_gradient(case, GAE(gamma=1.0, lam=lam), true_values(case))
    assert_close(got, exact_token_gradient(case), **TIGHT)


@given(sentences, st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_gae_with_a_wrong_value_is_off_by_what_it_believes_of_the_next_state(case, lam, seed):
    # Â₀ = r₀ + V(s₁) − V(s₀) + λ·(r₁ − V(s₁)): the bias is (1 − λ)·E[∇log π(a₀)·(V(s₁) − V^π(s₁))]
    values = any_values(seed)
    wrong = torch.where(TWO[:, 1], (values - true_values(case))[:, 1], 0.0)
    weights = token_logps(case.logits).sum(1).exp()
    bias = (1 - lam) * torch.einsum("i,i,iab->ab", weights, wrong, token_directions(case)[:, 0])
    got = expected_token_gradient(case, GAE(gamma=1.0, lam=lam), values)
    assert_close(got, exact_token_gradient(case) + bias, **TIGHT)


def test_lambda_below_one_and_a_discount_are_biased():
    # negative control: a wrong V at λ = 0.95 and at 0, and γ < 1, by amounts no rounding reaches
    case = random_sentences(4)
    expected = exact_token_gradient(case)
    for lam, amount in ((0.95, 0.005), (0.0, 0.1)):
        assert apart(expected_token_gradient(case, GAE(lam=lam), any_values(5)), expected) > amount
    for estimator in (RewardToGo(gamma=0.5), GAE(gamma=0.5, lam=1.0)):
        assert apart(expected_token_gradient(case, estimator, true_values(case)), expected) > 0.05


@given(sentences)
@settings(deadline=None, max_examples=15)
def test_group_estimators_on_tokens_are_those_on_responses(case):
    # all pairs of responses of one or two tokens, in one call; sums over tokens, means over the pair
    pairs = torch.tensor(list(product(range(7), repeat=2)))
    y, groups = pairs.flatten(), torch.arange(49).repeat_interleave(2)
    weights = token_logps(case.logits).sum(1).exp()[pairs].prod(1).repeat_interleave(2)
    rewards, mask, directions = token_rewards(case)[y], TWO[y], token_directions(case)[y]
    estimators = {BanditAdvantage(baseline=LeaveOneOut()): 1.0, GroupAdvantage(scale=NoScale()): 0.5}
    for estimator, share in estimators.items():
        advantages = estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=local).advantages
        got = torch.einsum("i,it,itab->ab", weights, advantages, directions) / 2
        assert_close(got, share * exact_token_gradient(case), **TIGHT)
        # negative control: the mean over each response's tokens is another gradient
        lengths = mask.sum(1, keepdim=True)
        means = torch.einsum("i,it,itab->ab", weights, advantages / lengths, directions) / 2
        assert apart(means, got) > 1e-6


@pytest.mark.parametrize(
    "estimator", [BanditAdvantage(baseline=LeaveOneOut()), GroupAdvantage(scale=NoScale())], ids=repr
)
def test_the_gradient_vanishes_at_the_optimum(estimator):
    # π* = π_ref·e^(r/β)/Z: there A is constant, and all of its differences are 0; negative control: π_ref is not it
    bandit = random_bandit(2, 3, 6)
    best = Bandit((bandit.reference + bandit.scores / BETA).log_softmax(1), bandit.reference, bandit.scores)
    _, gradients = batch_gradients(best, estimator, 2)
    assert gradients.abs().max() <= 1e-9
    start = Bandit(bandit.reference, bandit.reference, bandit.scores)
    assert expected_gradient(start, estimator, 2).abs().max() > 0.02
