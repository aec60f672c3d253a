"""Every surrogate, level, reduction and place of the KL against sums over all responses, on random problems.

One prompt, three tokens of which 0 ends a response, at most three of them: 15 responses of one to three tokens, and
tabular logits for each of the 7 prefixes. Masked slots hold NaN everywhere. Weighted by its probability, every
response stands in the batch once: what comes out is an expectation, not a sample.
"""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    CISPO,
    GAE,
    K1,
    K2,
    K3,
    BanditAdvantage,
    Clip,
    GeometricLevel,
    ImportanceSampling,
    KLInLoss,
    KLInReward,
    KLPen,
    MaskedIS,
    NoCorrection,
    ReferenceKL,
    RewardToGo,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    TruncatedIS,
    k1,
    k2,
    k3,
    local,
    penalized_rewards,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
SEEDS, BETAS = st.integers(0, 2**31), st.sampled_from([0.05, 0.4, 2.0])
SURROGATES = [
    ImportanceSampling(),
    Clip(epsilon=0.2),
    Clip(epsilon=0.2, epsilon_high=0.28),
    Clip(epsilon=0.2, dual=3.0),
    Clip(epsilon=3e-4, epsilon_high=4e-4, dual=1.5),
    CISPO(),
    CISPO(largest=1.2, smallest=0.8),
    KLPen(coef=0.5),
    KLPen(coef=7.0, target=None),
    TruncatedIS(surrogate=Clip()),
    MaskedIS(surrogate=CISPO()),
]
LEVELS = [(TokenLevel(), BanditAdvantage()), (TokenLevel(), RewardToGo()), (TokenLevel(), GAE(lam=1.0))]
LEVELS += [(SequenceLevel(), BanditAdvantage())]


# The setting, without the library.


class Rows(NamedTuple):
    prefix: torch.Tensor
    tokens: torch.Tensor
    response: torch.Tensor
    lengths: torch.Tensor


def all_responses(longest):
    responses = [
        y
        for n in range(1, longest + 1)
        for y in product(range(3), repeat=n)
        if 0 not in y[:-1] and (y[-1] == 0 or n == longest)
    ]
    prefixes = sorted({y[:t] for y in responses for t in range(len(y))}, key=lambda y: (len(y), y))
    width = longest + 1  # one column of padding even for the longest
    return Rows(
        torch.tensor([[prefixes.index(y[:t]) if t < len(y) else 0 for t in range(width)] for y in responses]),
        torch.tensor([[y[t] if t < len(y) else 1 for t in range(width)] for y in responses]),
        torch.tensor([[t < len(y) for t in range(width)] for y in responses]),
        torch.tensor([len(y) for y in responses]),
    )


RAGGED, SINGLE = all_responses(3), all_responses(1)


class Problem(NamedTuple):
    old: torch.Tensor
    new: torch.Tensor
    ref: torch.Tensor
    sampler: torch.Tensor
    scores: torch.Tensor
    beta: float


def problem(seed, beta=0.4):
    generator = torch.Generator().manual_seed(seed)
    old, step, ref, noise = torch.randn(4, 7, 3, dtype=torch.float64, generator=generator)
    scores = torch.randn(15, dtype=torch.float64, generator=generator)
    return Problem(old, old + 0.5 * step, ref, old + 0.3 * noise, scores, beta)


def token_logps(theta, rows):
    return torch.where(rows.response, theta.log_softmax(-1)[rows.prefix, rows.tokens], NAN)


def logps(theta, rows=RAGGED):
    return theta.log_softmax(-1)[rows.prefix, rows.tokens].where(rows.response, torch.tensor(0.0).double()).sum(1)


def mean_score(theta, p, rows=RAGGED):
    return (logps(theta, rows).exp() * p.scores[: len(rows.lengths)]).sum()


def kl(theta, other, rows=RAGGED):
    """KL(π_θ‖π_other), either of which may be differentiated."""
    logp = logps(theta, rows)
    return (logp.exp() * (logp - logps(other, rows))).sum()


def objective(theta, p, rows=RAGGED):
    return mean_score(theta, p, rows) - p.beta * kl(theta, p.ref, rows)


def gradient(function, theta):
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def apart(a, b):
    return float((a - b).abs().max())


# The same through the library.


def step_loss(
    theta,
    p,
    rows=RAGGED,
    *,
    old=None,
    surrogate=ImportanceSampling(),
    level=SequenceLevel(),
    estimator=BanditAdvantage(),
    reduction=SeqMeanTokenSum(),
    kl=KLInReward(),
    beta=None,
    ref=None,
    sampler=None,
    batch=None,
):
    """What an optimizer step minimizes: of the responses in `batch`, else expected over π_old, or over `sampler`."""
    beta, ref, old = p.beta if beta is None else beta, p.ref if ref is None else ref, p.old if old is None else old
    scores, drawn = p.scores[: len(rows.lengths)], logps(old if sampler is None else sampler, rows).exp()
    if batch is not None:
        rows, scores = Rows(*(column[batch] for column in rows)), scores[batch]
    response, logprobs = rows.response, token_logps(theta, rows)
    old_logprobs, ref_logprobs = token_logps(old, rows), token_logps(ref, rows)
    mask = level.mask(response)
    rewards = kl.in_reward(level.total(old_logprobs - ref_logprobs, response))
    rewards = penalized_rewards(scores, rewards, mask, coef=beta)
    credit = estimator(rewards, torch.zeros_like(rewards), mask, groups=torch.zeros_like(rows.lengths), all_sum=local)
    losses = surrogate(level.log_ratio(logprobs, old_logprobs, response), credit.advantages).loss
    losses = losses + beta * kl.in_loss(logprobs, ref_logprobs, old_logprobs, response, level)
    if sampler is not None:
        losses = losses * surrogate.weights(old_logprobs, token_logps(sampler, rows), response, level).applied
    count = reduction.count(mask)
    if batch is None:
        losses = losses * count * drawn.unsqueeze(1)
    return reduction.total(losses, mask) / count


def step_gradient(theta, p, rows=RAGGED, **settings):
    return gradient(lambda t: step_loss(t, p, rows, **settings), theta)


def test_the_enumeration_is_complete():
    assert len(RAGGED.lengths) == 15
    assert RAGGED.lengths.bincount().tolist() == [0, 1, 2, 12]
    assert SINGLE.lengths.tolist() == [1, 1, 1]
    for seed in range(3):
        assert_close(logps(problem(seed).old).exp().sum(), torch.tensor(1.0).double(), **TIGHT)


# Property 3 and 6: at π_old every surrogate has the gradient of J, per token and per response.


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
@given(seed=SEEDS, beta=BETAS)
@settings(deadline=None, max_examples=15)
def test_surrogate_gradient_at_the_old_policy_is_that_of_the_objective(surrogate, seed, beta):
    p = problem(seed, beta)
    expected = -gradient(lambda t: objective(t, p), p.old)
    for level, estimator in LEVELS:
        got = step_gradient(p.old, p, surrogate=surrogate, level=level, estimator=estimator)
        assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize(("level", "estimator"), LEVELS, ids=repr)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_wrong_settings_do_not_have_the_gradient_of_the_objective(surrogate, level, estimator):
    # negative control of the test above: sign of the KL, KL to π_old, no KL, mean over a response's tokens
    p = problem(0)
    expected = -gradient(lambda t: objective(t, p), p.old)
    settings = {"surrogate": surrogate, "level": level, "estimator": estimator}
    for wrong in ({"beta": -p.beta}, {"ref": p.old}, {"beta": 0.0}):
        assert apart(step_gradient(p.old, p, **settings, **wrong), expected) > 0.03
    mean = step_gradient(p.old, p, **settings, reduction=SeqMeanTokenMean())
    assert apart(mean, expected) > 0.03 if isinstance(level, TokenLevel) else apart(mean, expected) <= 1e-9


def test_wrong_estimators_and_weights_do_not_have_the_gradient_of_the_objective():
    p = problem(0)
    expected = -gradient(lambda t: objective(t, p), p.old)
    for estimator in (GAE(lam=0.5), GAE(gamma=0.5, lam=1.0), RewardToGo(gamma=0.5)):
        assert apart(step_gradient(p.old, p, level=TokenLevel(), estimator=estimator), expected) > 0.03
    # CISPO with a floor above 1 doubles it, and a surrogate away from π_old bounds it
    assert_close(step_gradient(p.old, p, surrogate=CISPO(smallest=2.0)), 2 * expected, **TIGHT)
    plain = step_gradient(p.new, p)
    for surrogate in (Clip(epsilon=0.2), CISPO(largest=1.2, smallest=0.8), KLPen(coef=7.0)):
        assert apart(step_gradient(p.new, p, surrogate=surrogate), plain) > 0.03
    # the geometric ratio divides every response by its length, on top of the clip
    assert apart(step_gradient(p.old, p, level=GeometricLevel()), expected) > 0.03


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_wrong_sign_and_wrong_reference_err_by_what_theory_says(seed, beta):
    # J has −β∇KL(π‖π_ref) in its gradient: with +β it errs by 2β∇KL, with the KL to π_old by β∇KL
    p = problem(seed, beta)
    expected, slope = -gradient(lambda t: objective(t, p), p.old), gradient(lambda t: kl(t, p.ref), p.old)
    assert_close(step_gradient(p.old, p, beta=-beta), expected - 2 * beta * slope, **TIGHT)
    assert_close(step_gradient(p.old, p, ref=p.old), expected - beta * slope, **TIGHT)


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_advantages_are_constant_and_the_gradient_zero_at_the_optimum(seed, beta):
    # π* = π_ref·e^(r/β)/Z, here over all responses; its conditionals are the tree's
    p = problem(seed, beta)
    tilted = logps(p.ref) + p.scores / beta
    best = torch.zeros(7, 3, dtype=torch.float64)
    for prefix in range(7):
        for token in range(3):
            through = [
                i
                for i, n in enumerate(RAGGED.lengths.tolist())
                if any(RAGGED.prefix[i, t] == prefix and RAGGED.tokens[i, t] == token for t in range(n))
            ]
            best[prefix, token] = tilted[through].logsumexp(0)
    value = beta * tilted.logsumexp(0)
    assert abs(float(objective(best, p) - value)) <= 1e-9  # J* = β·log Z
    assert abs(float(objective(p.old, p) - value + beta * kl(p.old, best))) <= 1e-9  # J = J* − β·KL(π‖π*)
    for level, estimator in LEVELS:
        assert step_gradient(best, p, old=best, level=level, estimator=estimator).abs().max() <= 1e-9


# Off-policy: what each surrogate's expectation is.


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_surrogate_overstates_the_objective_by_beta_kl_to_old(seed, beta):
    # E_old[ρA] = J(φ) + β·KL(φ‖old); KLPEN takes b·KL(old‖φ) off it
    p = problem(seed, beta)
    expected = objective(p.new, p) + beta * kl(p.new, p.old)
    for surrogate in (ImportanceSampling(), Clip(epsilon=1e9), KLPen(coef=0.0, target=None)):
        assert_close(-step_loss(p.new, p, surrogate=surrogate), expected, **TIGHT)
    got = -step_loss(p.new, p, surrogate=KLPen(coef=3.0))
    assert_close(got, expected - 3 * kl(p.old, p.new), **TIGHT)


def test_surrogate_identity_has_a_direction_and_belongs_to_whole_responses():
    # negative control of the test above
    p = problem(0)
    got = -step_loss(p.new, p)
    for wrong in (objective(p.new, p), objective(p.new, p) + p.beta * kl(p.old, p.new)):
        assert abs(float(got - wrong)) > 0.01
    assert abs(float(-step_loss(p.new, p, surrogate=KLPen(coef=3.0)) - got + 3 * kl(p.new, p.old))) > 0.01
    # per token ρ_t leaves out how likely the prefix has become
    assert abs(float(-step_loss(p.new, p, level=TokenLevel(), estimator=RewardToGo()) - got)) > 0.01


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_cispo_gradient_off_policy_equals_a_naive_sum(seed, beta):
    # Σ_y π_old(y) Σ_t weight_t·A·∇log π_θ(y_t), the weight a number
    p = problem(seed, beta)
    advantages = p.scores - beta * (logps(p.old) - logps(p.ref))
    drawn = logps(p.old).exp()

    def naive(theta, smallest, largest):
        total = 0.0
        new, old = theta.log_softmax(-1), p.old.log_softmax(-1)
        for i, n in enumerate(RAGGED.lengths.tolist()):
            for t in range(n):
                place = RAGGED.prefix[i, t], RAGGED.tokens[i, t]
                weight = min(max(float((new[place] - old[place]).detach().exp()), smallest), largest)
                total = total - drawn[i] * weight * advantages[i] * new[place]
        return total

    for smallest, largest in ((0.8, 1.2), (0.0, 1e9)):
        got = step_gradient(p.new, p, surrogate=CISPO(smallest=smallest, largest=largest), level=TokenLevel())
        assert_close(got, gradient(lambda t, a=smallest, b=largest: naive(t, a, b), p.new), **TIGHT)
    # without bounds it is the plain ratio's gradient, at both levels
    for level in (TokenLevel(), SequenceLevel()):
        got = step_gradient(p.new, p, surrogate=CISPO(largest=1e9), level=level)
        assert_close(got, step_gradient(p.new, p, level=level), **TIGHT)


@pytest.mark.parametrize("surrogate", SURROGATES[:9], ids=repr)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_one_token_responses_have_one_gradient_at_every_level(surrogate, seed):
    # GSPO with |y| = 1 is the token clip; so is any other surrogate
    p = problem(seed)
    tokens = step_gradient(p.new, p, SINGLE, surrogate=surrogate, level=TokenLevel())
    for level in (SequenceLevel(), GeometricLevel()):
        assert_close(step_gradient(p.new, p, SINGLE, surrogate=surrogate, level=level), tokens, **TIGHT)


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_the_geometric_ratio_at_the_old_policy_is_the_mean_of_means_of_tokens(seed, beta):
    # ∇ (1/|y|) Σ_t log π, so GSPO weighs long responses down exactly as GRPO's reduction does
    p = problem(seed, beta)
    geometric = step_gradient(p.old, p, level=GeometricLevel(), surrogate=Clip(epsilon=3e-4, epsilon_high=4e-4))
    assert_close(geometric, step_gradient(p.old, p, level=TokenLevel(), reduction=SeqMeanTokenMean()), **TIGHT)


# Reductions.


@given(SEEDS, BETAS, st.integers(1, 50))
@settings(deadline=None, max_examples=15)
def test_only_sums_of_responses_are_the_gradient_of_the_objective(seed, beta, length):
    p = problem(seed, beta)
    expected = -gradient(lambda t: objective(t, p), p.old)
    settings = {"level": TokenLevel(), "estimator": RewardToGo()}
    got = step_gradient(p.old, p, **settings, reduction=SeqMeanTokenSumNorm(length=length))
    assert_close(got, expected / length, **TIGHT)
    # the mean of means is the gradient of a sum in which a response of |y| tokens counts 1/|y|
    drawn, advantages = logps(p.old).exp(), p.scores - beta * (logps(p.old) - logps(p.ref))
    shorter = -gradient(lambda t: (drawn * advantages * logps(t) / RAGGED.lengths).sum(), p.old)
    assert_close(step_gradient(p.old, p, level=TokenLevel(), reduction=SeqMeanTokenMean()), shorter, **TIGHT)


def test_the_mean_of_means_is_not_even_parallel_to_the_gradient():
    # negative control: no constant repairs it, on ragged responses; on equal lengths the constant is the length
    p = problem(4)
    expected = -gradient(lambda t: objective(t, p), p.old).flatten()
    for estimator in (BanditAdvantage(), RewardToGo()):
        got = step_gradient(p.old, p, level=TokenLevel(), estimator=estimator, reduction=SeqMeanTokenMean()).flatten()
        assert torch.cosine_similarity(got, expected, 0) < 0.98
    single = step_gradient(p.old, p, SINGLE, level=TokenLevel(), reduction=SeqMeanTokenMean())
    assert_close(single, -gradient(lambda t: objective(t, p, SINGLE), p.old), **TIGHT)


@given(SEEDS, st.lists(st.integers(0, 14), min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
def test_the_token_mean_is_the_sequence_mean_off_by_a_factor_of_the_batch(seed, batch):
    # B / Σ|y|, the same for all its responses but another for the next batch
    p = problem(seed)
    sums = step_gradient(p.old, p, level=TokenLevel(), batch=batch)
    tokens = step_gradient(p.old, p, level=TokenLevel(), batch=batch, reduction=TokenMean())
    assert_close(tokens, sums * len(batch) / sum(int(RAGGED.lengths[i]) for i in batch), **TIGHT)


def test_the_token_mean_is_biased_over_batches():
    # negative control: expected over all batches of two, the sequence mean is −∇J and the token mean not parallel to it
    p = problem(4)
    expected = -gradient(lambda t: objective(t, p), p.old).flatten()
    drawn = logps(p.old).exp().tolist()
    means = {}
    for reduction in (SeqMeanTokenSum(), TokenMean()):
        means[reduction] = sum(
            drawn[i] * drawn[j] * step_gradient(p.old, p, level=TokenLevel(), batch=[i, j], reduction=reduction)
            for i, j in product(range(15), repeat=2)
        ).flatten()
    assert_close(means[SeqMeanTokenSum()], expected, **TIGHT)
    assert torch.cosine_similarity(means[TokenMean()], expected, 0) < 0.99


# Who sampled.


@pytest.mark.parametrize("inner", SURROGATES[:9], ids=repr)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_weighted_samples_of_another_policy_have_the_expectation_of_the_old_one(inner, seed):
    # E_sampler[w·∇loss] = E_old[∇loss] as long as no weight is cut, on whole responses, anywhere
    p = problem(seed)
    expected = step_gradient(p.new, p, surrogate=inner)
    for kind in (TruncatedIS(cap=1e9, surrogate=inner), MaskedIS(smallest=0, largest=1e9, surrogate=inner)):
        assert_close(step_gradient(p.new, p, surrogate=kind, sampler=p.sampler), expected, **TIGHT)


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_cut_weights_lose_exactly_what_is_cut(seed):
    # Σ_y sampler(y)·min(w, C)·A·∇log π, w = old/sampler; or only where w is inside the bounds
    p = problem(seed)
    advantages = p.scores - p.beta * (logps(p.old) - logps(p.ref))
    w, drawn = (logps(p.old) - logps(p.sampler)).exp(), logps(p.sampler).exp()
    for surrogate, kept in (
        (TruncatedIS(cap=1.1, surrogate=ImportanceSampling()), [min(x, 1.1) for x in w.tolist()]),
        (
            MaskedIS(smallest=0.8, largest=1.2, surrogate=ImportanceSampling()),
            [x if 0.8 <= x <= 1.2 else 0.0 for x in w.tolist()],
        ),
    ):
        weights = drawn * torch.tensor(kept, dtype=torch.float64) * advantages
        expected = -gradient(lambda t, weights=weights: (weights * logps(t)).sum(), p.old)
        assert_close(step_gradient(p.old, p, surrogate=surrogate, sampler=p.sampler), expected, **TIGHT)


def test_without_weights_or_with_cut_ones_the_sampler_shows():
    # negative control of the two tests above
    p = problem(0)
    expected = step_gradient(p.old, p)
    for surrogate in (
        ImportanceSampling(),
        TruncatedIS(cap=1.0, surrogate=ImportanceSampling()),
        MaskedIS(smallest=0.8, largest=1.2, surrogate=ImportanceSampling()),
    ):
        assert apart(step_gradient(p.old, p, surrogate=surrogate, sampler=p.sampler), expected) > 0.01


def test_nested_weights_count_the_sampler_once():
    p = problem(0)
    nested = TruncatedIS(cap=1e9, surrogate=TruncatedIS(cap=1e9, surrogate=ImportanceSampling()))
    assert_close(step_gradient(p.old, p, surrogate=nested, sampler=p.sampler), step_gradient(p.old, p), **TIGHT)


def test_token_weights_leave_the_prefix_uncorrected():
    # w_t = old/sampler of the token alone: exact for one token, an approximation of |y| > 1 (as TIS has it)
    p = problem(0)
    weighted = TruncatedIS(cap=1e9, surrogate=ImportanceSampling())
    settings = {"level": TokenLevel(), "sampler": p.sampler, "surrogate": weighted}
    single = step_gradient(p.old, p, SINGLE, **settings)
    assert_close(single, -gradient(lambda t: objective(t, p, SINGLE), p.old), **TIGHT)
    assert apart(step_gradient(p.old, p, **settings), -gradient(lambda t: objective(t, p), p.old)) > 0.01


@pytest.mark.parametrize("inner", SURROGATES[:9], ids=repr)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=15)
def test_weights_of_responses_correct_the_losses_of_their_tokens(inner, seed):
    # E_sampler[w(y)·Σ_t ∇loss_t] = E_old[Σ_t ∇loss_t], w(y) = old(y)/sampler(y), at π_old and away from it
    p = problem(seed)
    for estimator in (BanditAdvantage(), RewardToGo(), GAE(lam=0.9)):
        settings = {"level": TokenLevel(), "estimator": estimator}
        for theta in (p.old, p.new):
            expected = step_gradient(theta, p, surrogate=inner, **settings)
            for kind in (TruncatedIS, MaskedIS):
                bounds = {"cap": 1e9} if kind is TruncatedIS else {"smallest": 0.0, "largest": 1e9}
                weighted = kind(surrogate=inner, level=SequenceLevel(), **bounds)
                assert_close(
                    step_gradient(theta, p, surrogate=weighted, sampler=p.sampler, **settings), expected, **TIGHT
                )
    # so that at π_old it is ∇J
    weighted = TruncatedIS(surrogate=inner, level=SequenceLevel(), cap=1e9)
    settings = {"level": TokenLevel(), "estimator": RewardToGo(), "surrogate": weighted, "sampler": p.sampler}
    assert_close(step_gradient(p.old, p, **settings), -gradient(lambda t: objective(t, p), p.old), **TIGHT)


def test_no_other_weights_correct_the_losses_of_tokens():
    # negative control: no weights, w of each token, of the geometric mean, truncated or masked ones of responses
    p = problem(0)
    settings = {"level": TokenLevel(), "estimator": RewardToGo()}
    expected, plain = step_gradient(p.old, p, **settings), ImportanceSampling()
    for surrogate in (
        plain,
        NoCorrection(surrogate=plain, level=SequenceLevel()),
        TruncatedIS(surrogate=plain, cap=1e9),
        TruncatedIS(surrogate=plain, cap=1e9, level=GeometricLevel()),
        TruncatedIS(surrogate=plain, cap=1.0, level=SequenceLevel()),
        MaskedIS(surrogate=plain, smallest=0.8, largest=1.2, level=SequenceLevel()),
    ):
        assert apart(step_gradient(p.old, p, surrogate=surrogate, sampler=p.sampler, **settings), expected) > 0.01


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_cut_weights_of_responses_lose_exactly_what_is_cut_of_tokens(seed):
    # Σ_y sampler(y)·f(w(y))·Σ_t r·∇log π(y_t), f the cut
    p = problem(seed)
    w, drawn = (logps(p.old) - logps(p.sampler)).exp(), logps(p.sampler).exp()
    settings = {"level": TokenLevel(), "beta": 0.0, "estimator": RewardToGo(), "sampler": p.sampler}
    plain = ImportanceSampling()
    for surrogate, kept in (
        (TruncatedIS(cap=1.1, surrogate=plain, level=SequenceLevel()), w.clamp(max=1.1)),
        (
            MaskedIS(smallest=0.8, largest=1.2, surrogate=plain, level=SequenceLevel()),
            torch.tensor([x if 0.8 <= x <= 1.2 else 0.0 for x in w.tolist()], dtype=torch.float64),
        ),
    ):
        expected = -gradient(lambda t, kept=kept: (drawn * kept * p.scores * logps(t)).sum(), p.old)
        assert_close(step_gradient(p.old, p, surrogate=surrogate, **settings), expected, **TIGHT)


def test_effective_sample_size_is_that_of_the_enumerated_sampler():
    # (E w)²/E w² = 1/Σ_y old(y)²/sampler(y), whatever the correction cuts
    p = problem(0)
    old, drawn = token_logps(p.old, RAGGED), logps(p.sampler).exp()
    expected = 1 / (logps(p.old).exp().square() / drawn).sum()
    for surrogate in (TruncatedIS(cap=1.1), MaskedIS(level=SequenceLevel()), ImportanceSampling()):
        w = surrogate.weights(old, token_logps(p.sampler, RAGGED), RAGGED.response, SequenceLevel()).ratio.squeeze(1)
        assert_close((drawn * w).sum(), torch.tensor(1.0).double(), **TIGHT)
        assert_close((drawn * w).sum() ** 2 / (drawn * w.square()).sum(), expected, **TIGHT)
    assert 0.5 < float(expected) < 0.99


# Property 17: the table of KL estimators, on responses.


def estimator_loss(estimator, level):
    """Expected Σ over actions of an estimator as a loss, samples held fixed."""

    def loss(theta, p):
        total = level.total(token_logps(theta, RAGGED) - token_logps(p.ref, RAGGED), RAGGED.response)
        return (logps(theta).detach().exp().unsqueeze(1) * estimator(total)).sum()

    return loss


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_estimators_of_whole_responses_have_the_published_values_and_gradients(seed):
    p = problem(seed)
    reverse, forward = gradient(lambda t: kl(t, p.ref), p.old), gradient(lambda t: kl(p.ref, t), p.old)
    level = SequenceLevel()
    for estimator, slope in ((k1, torch.zeros(7, 3).double()), (k2, reverse), (k3, forward)):
        assert_close(gradient(lambda t, e=estimator: estimator_loss(e, level)(t, p), p.old), slope, **TIGHT)
    for estimator in (k1, k3):
        assert_close(estimator_loss(estimator, level)(p.old, p), kl(p.old, p.ref), **TIGHT)


@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_estimators_of_tokens_have_the_gradients_of_the_conditional_kls(seed):
    # Σ_t E[KL(π(·|s_t)‖π_ref(·|s_t))] with the states held fixed: what early tokens do to later states is left out
    p = problem(seed)

    def conditional(theta, forward):
        new, ref = theta.log_softmax(-1), p.ref.log_softmax(-1)
        a, b = (ref, new) if forward else (new, ref)
        per_prefix = (a.exp() * (a - b)).sum(-1)
        visits = torch.zeros(7, dtype=torch.float64)
        for i, probability in enumerate(logps(p.old).exp().tolist()):
            for t in range(int(RAGGED.lengths[i])):
                visits[RAGGED.prefix[i, t]] += probability
        return (visits * per_prefix).sum()

    for estimator, forward in ((k2, False), (k3, True)):
        got = gradient(lambda t, e=estimator: estimator_loss(e, TokenLevel())(t, p), p.old)
        assert_close(got, gradient(lambda t, f=forward: conditional(t, f), p.old), **TIGHT)
    none = gradient(lambda t: estimator_loss(k1, TokenLevel())(t, p), p.old)
    assert none.abs().max() <= 1e-9
    # the value needs no states held fixed: the sum of the tokens' KLs is the KL of the response
    for estimator in (k1, k3):
        assert_close(estimator_loss(estimator, TokenLevel())(p.old, p), kl(p.old, p.ref), **TIGHT)


def test_the_columns_of_the_table_differ():
    # negative control of the two tests above: k2's value, the direction of the KL, the level of the estimate
    p = problem(0)
    reverse, forward = gradient(lambda t: kl(t, p.ref), p.old), gradient(lambda t: kl(p.ref, t), p.old)
    assert abs(float(estimator_loss(k2, SequenceLevel())(p.old, p) - kl(p.old, p.ref))) > 0.05
    assert apart(reverse, forward) > 0.05
    assert apart(gradient(lambda t: estimator_loss(k2, TokenLevel())(t, p), p.old), reverse) > 0.01
    assert apart(gradient(lambda t: estimator_loss(k3, TokenLevel())(t, p), p.old), forward) > 0.01


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_estimators_in_the_reward_have_the_published_gradients(seed, beta):
    class InReward(KLInReward):
        def in_reward(self, kl_ref):
            return k3(kl_ref)

    p = problem(seed, beta)
    scores = gradient(lambda t: mean_score(t, p), p.old)
    reverse, forward = gradient(lambda t: kl(t, p.ref), p.old), gradient(lambda t: kl(p.ref, t), p.old)
    assert_close(step_gradient(p.old, p), -scores + beta * reverse, **TIGHT)
    assert_close(step_gradient(p.old, p, kl=InReward()), -scores + beta * (reverse - forward), **TIGHT)


def test_k2_and_k3_in_the_reward_are_wrong():
    # negative control: only k1 belongs there
    p = problem(0)
    expected = -gradient(lambda t: objective(t, p), p.old)
    for estimator in (k2, k3):

        class InReward(KLInReward):
            def in_reward(self, kl_ref, estimator=estimator):
                return estimator(kl_ref)

        for level, advantage in LEVELS:
            got = step_gradient(p.old, p, kl=InReward(), level=level, estimator=advantage)
            assert apart(got, expected) > 0.05


@pytest.mark.parametrize("action", [TokenLevel(), SequenceLevel()], ids=repr)
@given(seed=SEEDS, beta=BETAS)
@settings(deadline=None, max_examples=15)
def test_kl_in_the_loss_of_whole_responses_is_that_of_the_objective(action, seed, beta):
    p = problem(seed, beta)
    settings = {"level": action, "surrogate": Clip()}
    reverse, forward = gradient(lambda t: kl(t, p.ref), p.old), gradient(lambda t: kl(p.ref, t), p.old)
    scores = gradient(lambda t: mean_score(t, p), p.old)
    # k2 of the response: in the loss as in the reward, whatever an action is
    got = step_gradient(p.old, p, kl=KLInLoss(estimator=K2(), level=SequenceLevel()), **settings)
    assert_close(got, -scores + beta * reverse, **TIGHT)
    assert_close(got, step_gradient(p.old, p, kl=KLInReward(), **settings), **TIGHT)
    # k3: the forward KL, not that of eq. 2
    got = step_gradient(p.old, p, kl=KLInLoss(estimator=K3(), level=SequenceLevel()), **settings)
    assert_close(got, -scores + beta * forward, **TIGHT)


@given(SEEDS, BETAS)
@settings(deadline=None, max_examples=15)
def test_kl_in_the_loss_stays_that_of_the_response_beside_a_geometric_ratio(seed, beta):
    # GSPO shrinks its surrogate by |y| and leaves the KL: scores 0, so that only the KL is left
    p = problem(seed, beta)._replace(scores=torch.zeros(15, dtype=torch.float64))
    reverse = gradient(lambda t: kl(t, p.ref), p.old)
    for at in (None, SequenceLevel(), GeometricLevel()):
        got = step_gradient(p.old, p, kl=KLInLoss(level=at), level=GeometricLevel())
        assert_close(got, beta * reverse, **TIGHT)
    # negative control: in the reward it is divided by |y| with the rest
    if apart(reverse, torch.zeros_like(reverse)) > 0.1:
        got = step_gradient(p.old, p, kl=KLInReward(), level=GeometricLevel())
        assert apart(got, beta * reverse) > 1e-3 * beta


def test_kl_in_the_loss_errs_where_it_is_expected_to():
    # negative control: tokens' k2, k3 of either level, and a mean over the tokens of a response
    p = problem(0)
    expected = -gradient(lambda t: objective(t, p), p.old)
    tokens = {"level": TokenLevel()}
    for wrong in (
        {"kl": KLInLoss()},
        {"kl": KLInLoss(estimator=K3())},
        {"kl": KLInLoss(estimator=K3(), level=SequenceLevel())},
        {"kl": KLInLoss(level=SequenceLevel()), "reduction": SeqMeanTokenMean()},
        {"kl": KLInLoss(level=SequenceLevel()), "beta": -p.beta},
        {"kl": KLInLoss(level=SequenceLevel()), "ref": p.old},
    ):
        assert apart(step_gradient(p.old, p, **tokens, **wrong), expected) > 0.01
    right = step_gradient(p.old, p, **tokens, kl=KLInLoss(level=SequenceLevel()))
    assert_close(right, expected, **TIGHT)
    # over responses of one token the two levels are one
    single = step_gradient(p.old, p, SINGLE, **tokens, kl=KLInLoss())
    assert_close(single, -gradient(lambda t: objective(t, p, SINGLE), p.old), **TIGHT)


def expected_kl(theta, p, term, action, *, drawn, taken_for=None):
    """Σ_y drawn(y)·(KL in the loss of y), its sampler taken for another policy or for what it is."""
    sampler = token_logps(drawn if taken_for is None else taken_for, RAGGED)
    each = term.in_loss(token_logps(theta, RAGGED), token_logps(p.ref, RAGGED), sampler, RAGGED.response, action)
    return (logps(drawn).exp() * each.sum(1)).sum()


def kl_of_next_tokens(theta, p, drawn):
    """Σ over states of drawn(state)·KL(π_θ(·|state)‖π_ref(·|state))."""
    logp, ref = theta.log_softmax(-1), p.ref.log_softmax(-1)
    at = (logp.exp() * (logp - ref)).sum(-1)[RAGGED.prefix]  # each state as often as it is reached
    return (logps(drawn).exp() * at.where(RAGGED.response, torch.tensor(0.0).double()).sum(1)).sum()


@pytest.mark.parametrize("estimator", [K1(), K3()], ids=repr)
@pytest.mark.parametrize("action", [TokenLevel(), SequenceLevel()], ids=repr)
@given(seed=SEEDS)
@settings(deadline=None, max_examples=10)
def test_unbiased_kl_has_value_and_gradient_of_the_kl_whatever_sampled(action, estimator, seed):
    p = problem(seed)
    for drawn in (p.old, p.sampler, p.new):
        for at, exact in (
            (SequenceLevel(), lambda t: kl(t, p.ref)),
            (TokenLevel(), lambda t, drawn=drawn: kl_of_next_tokens(t, p, drawn)),
        ):
            term = KLInLoss(estimator=estimator, level=at, unbiased=True)

            def found(t, term=term, drawn=drawn):
                return expected_kl(t, p, term, action, drawn=drawn)

            assert_close(found(p.new), exact(p.new), **TIGHT)
            assert_close(gradient(found, p.new), gradient(exact, p.new), **TIGHT)


def test_kl_without_the_live_ratio_of_the_sampler_is_another():
    """Negative control: no ratio, k2, and the ratio to π_old (TRL) where another policy sampled."""
    p = problem(0)
    exact, slope = kl(p.new, p.ref), gradient(lambda t: kl(t, p.ref), p.new)
    unbiased = KLInLoss(estimator=K3(), level=SequenceLevel(), unbiased=True)
    for term, taken_for in (
        (KLInLoss(estimator=K3(), level=SequenceLevel()), None),
        (KLInLoss(estimator=K2(), level=SequenceLevel()), None),
        (unbiased, p.old),
    ):

        def found(t, term=term, taken_for=taken_for):
            return expected_kl(t, p, term, SequenceLevel(), drawn=p.sampler, taken_for=taken_for)

        assert abs(float(found(p.new) - exact)) > 0.01
        assert apart(gradient(found, p.new), slope) > 0.01
    # π_old is right where it sampled
    assert_close(expected_kl(p.new, p, unbiased, SequenceLevel(), drawn=p.old, taken_for=p.old), exact, **TIGHT)


def test_kl_in_both_places_counts_twice():
    class Both(ReferenceKL):
        def in_reward(self, kl_ref):
            return KLInReward().in_reward(kl_ref)

        def in_loss(self, *arguments):
            return KLInLoss(level=SequenceLevel()).in_loss(*arguments)

    p = problem(0)
    scores, reverse = gradient(lambda t: mean_score(t, p), p.old), gradient(lambda t: kl(t, p.ref), p.old)
    for level in (TokenLevel(), SequenceLevel()):
        assert_close(step_gradient(p.old, p, kl=Both(), level=level), -scores + 2 * p.beta * reverse, **TIGHT)


# Properties 12, 13 and 14: microbatches, padding and order, of the whole step.


PARTS = [
    {"level": level, "estimator": estimator, "reduction": reduction, "kl": kl}
    for level, estimator in [*LEVELS, (GeometricLevel(), BanditAdvantage())]
    for reduction in (TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean(), SeqMeanTokenSumNorm(length=4))
    for kl in (KLInReward(), KLInLoss(level=SequenceLevel()), KLInLoss(estimator=K3()))
]


@given(SEEDS, st.lists(st.integers(0, 14), min_size=2, max_size=6), st.sampled_from(PARTS), st.sampled_from(SURROGATES))
@settings(deadline=None, max_examples=30)
def test_padding_and_the_order_of_responses_change_no_gradient(seed, batch, parts, surrogate):
    p = problem(seed)
    settings = {"surrogate": surrogate, "sampler": p.sampler, **parts}
    reference = step_gradient(p.new, p, batch=batch, **settings)
    assert reference.isfinite().all()
    assert_close(step_gradient(p.new, p, batch=batch[::-1], **settings), reference, **TIGHT)
    wide = Rows(*(torch.nn.functional.pad(x, (0, 3)) for x in RAGGED[:3]), RAGGED.lengths)
    assert_close(step_gradient(p.new, p, wide, batch=batch, **settings), reference, **TIGHT)


@given(SEEDS, st.lists(st.integers(0, 14), min_size=2, max_size=6), st.sampled_from(PARTS), st.sampled_from(SURROGATES))
@settings(deadline=None, max_examples=30)
def test_microbatches_with_the_steps_count_have_the_gradient_of_the_batch(seed, batch, parts, surrogate):
    p = problem(seed)
    settings = {"surrogate": surrogate, "sampler": p.sampler, **parts}
    pieces = [batch[:1], batch[1:]]
    # what an action is, and whether actions or responses are counted, by hand
    tokens = isinstance(parts["reduction"], TokenMean) and isinstance(parts["level"], TokenLevel)
    counts = [sum(int(RAGGED.lengths[i]) if tokens else 1 for i in piece) for piece in pieces]
    got = [n * step_gradient(p.new, p, batch=piece, **settings) for n, piece in zip(counts, pieces, strict=True)]
    assert_close((got[0] + got[1]) / sum(counts), step_gradient(p.new, p, batch=batch, **settings), **TIGHT)


def test_the_mean_of_microbatch_gradients_is_another():
    # negative control of the test above, responses of 1, 2 and 3 tokens
    p = problem(0)
    for reduction in (TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean(), SeqMeanTokenSumNorm(length=4)):
        settings = {"level": TokenLevel(), "reduction": reduction}
        parts = [step_gradient(p.new, p, batch=piece, **settings) for piece in ([0], [1, 14])]
        assert apart((parts[0] + parts[1]) / 2, step_gradient(p.new, p, batch=[0, 1, 14], **settings)) > 0.01
