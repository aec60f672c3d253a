"""The contextual bandit of eq. 2, enumerated: what the library's pieces give together against the exact objective.

Two prompts, vocabulary of three, tabular logits: one distribution of the first token per prompt and one of the second
per prompt and first token (24 numbers). `FIXED` holds all 2·9 responses of two tokens; in `RAGGED` token 0 ends a
response, so there are 2·7, of one or two tokens. Expected values are sums over every response, weighted by ½·π_old.
"""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import (
    CISPO,
    GAE,
    BanditAdvantage,
    BatchMean,
    Clip,
    ImportanceSampling,
    KLPen,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    local,
    penalized_rewards,
    token_logprobs,
)

TIGHT = {"rtol": 0, "atol": 1e-9}
BETA = 0.4
PLAIN = ImportanceSampling()
BOUND = [
    Clip(epsilon=0.2),
    Clip(epsilon=0.2, epsilon_high=0.28, dual=3.0),
    CISPO(largest=1.2, smallest=0.8),
    KLPen(coef=0.5),
    KLPen(coef=7.0),
]
SURROGATES = [*BOUND, PLAIN, KLPen(coef=0.0, target=None), CISPO()]
PENALTIES = [0.5, 7.0]


class Case(NamedTuple):
    prompt: torch.Tensor
    tokens: torch.Tensor
    response: torch.Tensor
    scores: torch.Tensor


def case(responses):
    rows = [(x, y) for x in range(2) for y in responses]
    scores = torch.randn(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    return Case(
        torch.tensor([x for x, _ in rows]),
        torch.tensor([(*y, 0)[:2] for _, y in rows]),
        torch.tensor([[True, len(y) == 2] for _, y in rows]),
        scores,
    )


FIXED = case(list(product(range(3), range(3))))
RAGGED = case([(0,), *product((1, 2), range(3))])


def random_theta(seed):
    return torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REF, OLD, NEW = random_theta(0), random_theta(1), random_theta(2)


# Plain enumeration, without the library.


def sequence_logps(theta, rows):
    first = theta[:6].view(2, 3).log_softmax(-1)
    second = theta[6:].view(2, 3, 3).log_softmax(-1)
    logps = []
    for x, (a, b), (_, two) in zip(rows.prompt.tolist(), rows.tokens.tolist(), rows.response.tolist(), strict=True):
        logps.append(first[x, a] + second[x, a, b] if two else first[x, a])
    return torch.stack(logps)


def objective(theta, rows, *, beta=BETA, reference=REF):
    """J = ½ Σ_x Σ_y π(y|x)·(r − β·log π(y|x)/π_ref(y|x)), eq. 2 with γ = 0."""
    logps = sequence_logps(theta, rows)
    return 0.5 * (logps.exp() * (rows.scores - beta * (logps - sequence_logps(reference, rows)))).sum()


def kl(theta, other, rows):
    logps = sequence_logps(theta, rows)
    return 0.5 * (logps.exp() * (logps - sequence_logps(other, rows))).sum()


def gradient(function, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def optimum(rows, beta=BETA):
    """Logits of π* = π_ref·e^(r/β)/Z, and J* = ½ Σ_x β·log Z (two-token responses only)."""
    tilted = (sequence_logps(REF, rows) + rows.scores / beta).view(2, 3, 3)
    return torch.cat([tilted.logsumexp(2).flatten(), tilted.flatten()]), 0.5 * beta * tilted.logsumexp((1, 2)).sum()


# The same through the library.


def library_tokens(theta, rows):
    first, second = theta[:6].view(2, 3), theta[6:].view(2, 3, 3)
    logits = torch.stack([first[rows.prompt], second[rows.prompt, rows.tokens[:, 0]]], 1)
    return token_logprobs(logits, rows.tokens)


def library_objective(
    theta,
    rows,
    *,
    old=None,
    surrogate=PLAIN,
    level=SequenceLevel(),
    estimator=BanditAdvantage(),
    reduction=SeqMeanTokenSum(),
    beta=BETA,
    reference=REF,
    values=None,
    weighted=True,
):
    """−E_old[surrogate]: the expectation over every row if `weighted`, else the rows as they are a batch."""
    old = theta.detach() if old is None else old
    old_logprobs, response = library_tokens(old, rows), rows.response
    mask = level.mask(response)
    kl_ref = level.total(old_logprobs - library_tokens(reference, rows), response)
    values = torch.zeros_like(old_logprobs) if values is None else values
    rewards = penalized_rewards(rows.scores, kl_ref, mask, coef=beta)
    credit = estimator(rewards, level.state_value(values, response), mask, groups=rows.prompt, all_sum=local)
    loss = surrogate(level.log_ratio(library_tokens(theta, rows), old_logprobs, response), credit.advantages).loss
    count = reduction.count(mask)
    if weighted:
        loss = loss * count * 0.5 * sequence_logps(old, rows).exp().unsqueeze(1)
    return -reduction.total(loss, mask) / count


def library_gradient(theta, rows, **settings):
    return gradient(lambda t: library_objective(t, rows, **settings), theta)


def batch_gradients(theta, rows, **settings):
    """Expected gradient over all batches of two independent rows."""
    weights = (0.5 * sequence_logps(theta, rows).exp()).tolist()
    total = torch.zeros_like(theta)
    for i, j in product(range(len(weights)), repeat=2):
        batch = Case(*(column[[i, j]] for column in rows))
        total += weights[i] * weights[j] * library_gradient(theta, batch, weighted=False, **settings)
    return total


def apart(a, b):
    return float((a - b).abs().max())


# The setting itself.


@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_the_enumeration_is_complete_and_the_library_gives_the_same_logprobs(rows):
    logps = sequence_logps(OLD, rows)
    assert_close(logps.exp().view(2, -1).sum(1), torch.ones(2, dtype=torch.float64), **TIGHT)
    got = SequenceLevel().total(library_tokens(OLD, rows), rows.response).squeeze(1)
    assert_close(got, logps, **TIGHT)


def test_the_kl_of_a_rollout_is_that_of_the_sequence_distributions():
    # mean over responses of Σ_t log π_old − log π_ref, at either level
    for level in (SequenceLevel(), TokenLevel()):
        kl_ref = level.total(library_tokens(OLD, RAGGED) - library_tokens(REF, RAGGED), RAGGED.response).sum(1)
        got = (0.5 * sequence_logps(OLD, RAGGED).exp() * kl_ref).sum()
        assert_close(got, kl(OLD, REF, RAGGED), **TIGHT)


# facts 2: the score-function identity.


@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_detached_kl_reward_gives_the_gradient_of_the_objective(rows):
    assert_close(library_gradient(OLD, rows), gradient(lambda t: objective(t, rows), OLD), **TIGHT)


def test_gradient_is_zero_at_the_optimum_and_only_there():
    best, value = optimum(FIXED)
    assert_close(objective(best, FIXED), value, **TIGHT)
    assert_close(objective(OLD, FIXED), value - BETA * kl(OLD, best, FIXED), **TIGHT)  # J(π) = J* − β·KL(π‖π*)
    assert library_gradient(best, FIXED).abs().max() <= 1e-9
    # negative controls: not zero at π_ref, nor at the optimum of another β
    assert library_gradient(REF, FIXED).abs().max() > 0.01
    assert library_gradient(optimum(FIXED, 2 * BETA)[0], FIXED).abs().max() > 0.01


def test_advantage_at_the_optimum_is_the_same_for_every_response():
    # A = r − β·log π*/π_ref = β·log Z(x): only the prompt is left
    best, value = optimum(FIXED)
    kl_ref = SequenceLevel().total(library_tokens(best, FIXED) - library_tokens(REF, FIXED), FIXED.response)
    mask = SequenceLevel().mask(FIXED.response)
    rewards = penalized_rewards(FIXED.scores, kl_ref, mask, coef=BETA)
    advantages = BanditAdvantage()(rewards, torch.zeros_like(rewards), mask, groups=FIXED.prompt, all_sum=local)
    per_prompt = advantages.advantages.view(2, 9)
    assert_close(per_prompt, per_prompt[:, :1].expand(2, 9), **TIGHT)
    assert_close(per_prompt[:, 0].mean(), value, **TIGHT)


@pytest.mark.parametrize("wrong", [{"beta": -BETA}, {"reference": OLD}, {"beta": 0.0}], ids=["sign", "to old", "none"])
def test_a_wrong_kl_does_not_give_the_gradient_of_the_objective(wrong):
    # negative control: the sign flipped, the KL to π_old instead of π_SFT, no KL at all
    expected = gradient(lambda t: objective(t, FIXED), OLD)
    assert apart(library_gradient(OLD, FIXED, **wrong), expected) > 0.01


# facts 3: the surrogates at π = π_old.


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_surrogate_gradient_at_the_old_policy_is_that_of_the_objective(rows, surrogate):
    got = library_gradient(OLD, rows, surrogate=surrogate)
    assert_close(got, gradient(lambda t: objective(t, rows), OLD), **TIGHT)
    tokens = library_gradient(OLD, rows, surrogate=surrogate, level=TokenLevel(), estimator=GAE(lam=1.0))
    assert_close(tokens, got, **TIGHT)


@pytest.mark.parametrize("surrogate", BOUND, ids=repr)
def test_surrogate_gradient_away_from_the_old_policy_is_held_back(surrogate):
    # negative control of the test above: at another policy clip and penalty do change the gradient
    bound = library_gradient(NEW, FIXED, old=OLD, surrogate=surrogate)
    assert apart(bound, library_gradient(NEW, FIXED, old=OLD)) > 0.01


@pytest.mark.parametrize("coef", PENALTIES)
def test_penalty_has_no_gradient_at_the_old_policy_and_that_of_kl_old_elsewhere(coef):
    def penalty(theta):
        bound = library_objective(theta, FIXED, old=OLD, surrogate=KLPen(coef=coef))
        return library_objective(theta, FIXED, old=OLD) - bound

    assert gradient(penalty, OLD).abs().max() <= 1e-9
    assert_close(gradient(penalty, NEW), coef * gradient(lambda t: kl(OLD, t, FIXED), NEW), **TIGHT)
    # negative control: it is KL(π_old‖π_θ), not KL(π_θ‖π_old)
    assert apart(gradient(penalty, NEW), coef * gradient(lambda t: kl(t, OLD, FIXED), NEW)) > 0.01


# facts 4: constants in the reward.


def test_a_constant_per_prompt_leaves_the_expected_gradient():
    shifted = FIXED._replace(scores=FIXED.scores + torch.tensor([5.0, -3.0], dtype=torch.float64)[FIXED.prompt])
    assert_close(library_gradient(OLD, shifted), library_gradient(OLD, FIXED), **TIGHT)
    # negative control: a constant per response does not
    moved = FIXED._replace(scores=FIXED.scores + torch.arange(18, dtype=torch.float64))
    assert apart(library_gradient(OLD, moved), library_gradient(OLD, FIXED)) > 0.01


# facts 5: reward and β scaled together.


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_reward_and_beta_scaled_together_scale_the_gradient_and_keep_the_optimum(scale):
    scaled = FIXED._replace(scores=scale * FIXED.scores)
    got = library_gradient(OLD, scaled, beta=scale * BETA)
    assert_close(got, scale * library_gradient(OLD, FIXED), **TIGHT)
    best, value = optimum(FIXED)
    assert library_gradient(best, scaled, beta=scale * BETA).abs().max() <= 1e-9
    assert_close(optimum(scaled, scale * BETA)[1], scale * value, **TIGHT)
    # negative control: the reward alone moves the optimum
    assert library_gradient(best, scaled).abs().max() > 0.01


def test_beta_moves_the_optimum_from_the_best_response_to_the_reference():
    # π*_β for β → ∞ is π_ref, for β → 0 the best response; the library's gradient vanishes along the whole path
    for beta in (0.02, 0.2, 2.0, 2000.0):
        assert library_gradient(optimum(FIXED, beta)[0], FIXED, beta=beta).abs().max() <= 1e-9
    # |log π*/π_ref| ≤ (max r − min r)/β, which is below 6/2000
    assert apart(sequence_logps(optimum(FIXED, 2000.0)[0], FIXED), sequence_logps(REF, FIXED)) < 0.003
    greedy = sequence_logps(optimum(FIXED, 0.02)[0], FIXED).view(2, 9)
    assert torch.equal(greedy.argmax(1), FIXED.scores.view(2, 9).argmax(1))
    assert greedy.exp().amax(1).min() > 0.9


# facts 6: token level and sequence level.


@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_token_and_sequence_level_have_the_same_expected_gradient(rows):
    expected = gradient(lambda t: objective(t, rows), OLD)
    for estimator in (GAE(gamma=1.0, lam=1.0), BanditAdvantage()):
        assert_close(library_gradient(OLD, rows, level=TokenLevel(), estimator=estimator), expected, **TIGHT)
    # negative controls: λ < 1 with V = 0, and a discount, are biased
    for estimator in (GAE(gamma=1.0, lam=0.5), GAE(gamma=0.5, lam=1.0)):
        assert apart(library_gradient(OLD, rows, level=TokenLevel(), estimator=estimator), expected) > 0.01


def test_single_responses_agree_when_the_reward_is_spread_and_not_with_reward_to_go():
    gap = 0.0
    for i in range(len(RAGGED.prompt)):
        row = Case(*(column[i : i + 1] for column in RAGGED))
        sequence = library_gradient(OLD, row, weighted=False)
        spread = library_gradient(OLD, row, weighted=False, level=TokenLevel())
        assert_close(spread, sequence, **TIGHT)
        to_go = library_gradient(OLD, row, weighted=False, level=TokenLevel(), estimator=GAE(lam=1.0))
        gap = max(gap, apart(to_go, sequence))
    assert gap > 0.01


def test_a_value_of_the_state_leaves_the_expected_gradient():
    # V(x) before the first token, V(x, y₁) before the second: any numbers will do, with λ = 1
    table = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    values = torch.stack([table[RAGGED.prompt, 3], table[RAGGED.prompt, RAGGED.tokens[:, 0]]], 1)
    expected = gradient(lambda t: objective(t, RAGGED), OLD)
    for level in (TokenLevel(), SequenceLevel()):
        got = library_gradient(OLD, RAGGED, level=level, estimator=GAE(lam=1.0), values=values)
        assert_close(got, expected, **TIGHT)
        # negative control: a "value" that has seen the action it should judge
        peeking = values + RAGGED.tokens.double()
        biased = library_gradient(OLD, RAGGED, level=level, estimator=GAE(lam=1.0), values=peeking)
        assert apart(biased, expected) > 0.01


def test_the_mean_over_sequences_is_unbiased_over_batches_and_the_mean_over_tokens_is_not():
    expected = gradient(lambda t: objective(t, RAGGED), OLD)
    settings = {"level": TokenLevel(), "estimator": GAE(lam=1.0)}
    assert_close(batch_gradients(OLD, RAGGED, **settings), expected, **TIGHT)
    tokens = batch_gradients(OLD, RAGGED, reduction=TokenMean(), **settings)
    # not even in direction: the number of tokens differs from batch to batch
    assert torch.cosine_similarity(tokens, expected, 0) < 0.9999
    assert apart(tokens, expected) > 0.01


def test_batch_mean_shrinks_the_expected_gradient_by_one_over_n():
    # a response takes part in its own baseline: (n − 1)/n = ½ with n = 2
    expected = gradient(lambda t: objective(t, FIXED), OLD)
    got = batch_gradients(OLD, FIXED, estimator=BanditAdvantage(baseline=BatchMean()))
    assert_close(got, expected / 2, **TIGHT)
    assert_close(batch_gradients(OLD, FIXED), expected, **TIGHT)


# facts 18: what the surrogate over-states, and where iterating it leads.


@pytest.mark.parametrize("surrogate", [PLAIN, KLPen(coef=0.0, target=None), Clip(epsilon=1e9)], ids=repr)
@pytest.mark.parametrize("rows", [FIXED, RAGGED], ids=["fixed", "ragged"])
def test_surrogate_overstates_the_objective_by_beta_kl_to_old(rows, surrogate):
    # E_old[ρA] = J(φ) + β·KL(φ‖old)
    got = library_objective(NEW, rows, old=OLD, surrogate=surrogate)
    assert_close(got, objective(NEW, rows) + BETA * kl(NEW, OLD, rows), **TIGHT)
    # negative controls: it is not J, and the KL has a direction
    assert abs(float(got - objective(NEW, rows))) > 0.01
    assert abs(float(got - objective(NEW, rows) - BETA * kl(OLD, NEW, rows))) > 0.01


def test_clip_never_overstates_more_than_the_plain_ratio():
    plain = library_objective(NEW, FIXED, old=OLD)
    assert library_objective(NEW, FIXED, old=OLD, surrogate=Clip(epsilon=0.2)) < plain - 0.01


def as_theta(logps):
    """Logits whose responses have these log-probabilities, up to one constant per prompt (two tokens only)."""
    return torch.cat([logps.view(2, 3, 3).logsumexp(2).flatten(), logps.flatten()])


def iterated(b, beta, rounds, *, start=REF):
    """Maximise the KLPEN surrogate exactly, re-centre at the result, repeat.

    max over q of Σ qA + b Σ old·log q, Σ q = 1, is at q = b·old/(λ − A), λ > max A: bisection on the gap λ − max A,
    which lies in (0, b]. That this is where the *library's* surrogate is largest is checked at every round.
    """
    theta = start
    for _ in range(rounds):
        old, logps = theta, sequence_logps(theta, FIXED)
        advantages = (FIXED.scores - beta * (logps - sequence_logps(REF, FIXED))).view(2, 9)
        behind = advantages.amax(1, keepdim=True) - advantages
        below, above = torch.zeros(2, 1, dtype=torch.float64), torch.full((2, 1), b, dtype=torch.float64)
        for _ in range(100):
            gap = (below + above) / 2
            heavy = (b * logps.exp().view(2, 9) / (gap + behind)).sum(1, keepdim=True) > 1
            below, above = torch.where(heavy, gap, below), torch.where(heavy, above, gap)
        theta = as_theta((b * logps.exp().view(2, 9) / (gap + behind)).log())
        surrogate = KLPen(coef=b, target=None)
        assert library_gradient(theta, FIXED, old=old, surrogate=surrogate, beta=beta).abs().max() <= 1e-9
    return theta


@pytest.mark.parametrize("b", [0.25, 0.4, 0.6, 1.0])
def test_kl_penalty_iterated_reaches_the_optimum_where_b_is_above_half_of_beta(b):
    # near π* the error is multiplied by 1 − β/b at every round: −0.6, 0, 0.33 and 0.6; β/2 is 0.2
    best, value = optimum(FIXED)
    found = iterated(b, BETA, 60)
    assert abs(float(objective(found, FIXED) - value)) <= 1e-9
    assert apart(sequence_logps(found, FIXED), sequence_logps(best, FIXED)) <= 1e-9
    assert value - objective(REF, FIXED) > 0.1


@pytest.mark.parametrize("b", [0.05, 0.1, 0.15])
def test_kl_penalty_iterated_misses_the_optimum_where_b_is_below_half_of_beta(b):
    # negative control: −7, −3 and −1.67; it swings to and fro, even from close by, yet π* itself is a fixed point
    best, value = optimum(FIXED)
    close = as_theta(sequence_logps(best, FIXED) + 0.01 * FIXED.scores.sin())
    for start in (REF, close):
        for rounds in (30, 31):
            assert objective(iterated(b, BETA, rounds, start=start), FIXED) < value - 0.01
    assert value - objective(close, FIXED) < 1e-4
    once = iterated(b, BETA, 1, start=best)
    assert apart(sequence_logps(once, FIXED), sequence_logps(best, FIXED)) <= 1e-9


def test_kl_penalty_does_not_stand_in_for_the_kl_to_sft():
    # negative control: without β the iteration leaves π* for the best response of each prompt
    best, value = optimum(FIXED)
    found = iterated(1.0, 0.0, 25)
    assert kl(found, best, FIXED) > 0.1
    assert objective(found, FIXED) < value - 0.05
    assert torch.equal(sequence_logps(found, FIXED).view(2, 9).argmax(1), FIXED.scores.view(2, 9).argmax(1))
