import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    K1,
    K2,
    K3,
    GeometricLevel,
    KLEstimator,
    KLInLoss,
    KLInReward,
    ReferenceKL,
    SequenceLevel,
    TokenLevel,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
UNASKED = torch.tensor(NAN)
"""log π_sampler, which an estimate without the live ratio has no need of."""
LEVELS = [TokenLevel(), SequenceLevel(), GeometricLevel()]
NAIVE = {K1: lambda x: x, K2: lambda x: x * x / 2, K3: lambda x: math.exp(-x) - 1 + x}
SLOPE = {K1: lambda x: 1.0, K2: lambda x: x, K3: lambda x: 1 - math.exp(-x)}
LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def step(lengths, seed):
    """log π_θ, log π_ref and the response; NaN outside it."""
    response = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    both = -torch.rand(2, len(lengths), 4, dtype=torch.float64, generator=generator) * 2
    return *torch.where(response, both, NAN), response


def per_token(level):
    return isinstance(level, TokenLevel)


def padded(rows):
    return torch.tensor([list(row) + [0.0] * (4 - len(row)) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("kind", [K1, K2, K3])
@given(x=st.floats(-4, 4))
@settings(deadline=None, max_examples=15)
def test_estimators_equal_naive_scalars(kind, x):
    got = kind()(torch.tensor([[x]], dtype=torch.float64))
    assert got.shape == (1, 1)
    assert abs(got.item() - NAIVE[kind](x)) <= 1e-9


@pytest.mark.parametrize("kind", [K2, K3])
@pytest.mark.parametrize("at", [None, *LEVELS], ids=repr)
@pytest.mark.parametrize("action", LEVELS, ids=repr)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=8)  # of each of 24 combinations
def test_kl_in_the_loss_equals_a_naive_loop(action, at, kind, lengths, seed):
    logprobs, ref, response = step(lengths, seed)
    values, slopes = [], []
    for i, n in enumerate(lengths):
        x = [float(logprobs[i, t] - ref[i, t]) for t in range(n)]
        whole = sum(x)
        if per_token(at or action):
            values.append([NAIVE[kind](y) for y in x])
            slopes.append([SLOPE[kind](y) for y in x])
        else:
            values.append([NAIVE[kind](whole) / max(n, 1)] * n)
            slopes.append([SLOPE[kind](whole)] * n)
    logprobs.requires_grad_()
    got = KLInLoss(estimator=kind(), level=at).in_loss(logprobs, ref, UNASKED, response, action)
    expected = padded(values)
    assert_close(got, expected if per_token(action) else expected.sum(1, keepdim=True), **TIGHT)
    # the gradient of Σ over actions, NaN nowhere
    assert_close(torch.autograd.grad(got.sum(), logprobs)[0], padded(slopes), **TIGHT)


@pytest.mark.parametrize("action", LEVELS, ids=repr)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=15)
def test_kl_in_the_reward_is_the_log_ratio_and_no_loss(action, lengths, seed):
    logprobs, ref, response = step(lengths, seed)
    kl_ref = action.total(logprobs - ref, response)
    rows = [[float(logprobs[i, t] - ref[i, t]) for t in range(n)] for i, n in enumerate(lengths)]
    expected = padded(rows) if per_token(action) else padded(rows).sum(1, keepdim=True)
    assert_close(KLInReward().in_reward(kl_ref), expected, **TIGHT)
    nothing = KLInReward().in_loss(logprobs, ref, UNASKED, response, action)
    assert torch.equal(nothing, torch.zeros(len(lengths), 4 if per_token(action) else 1, dtype=torch.float64))


def test_kl_in_the_loss_leaves_the_reward_alone(float64):
    kl_ref = float64([[0.3, -0.2, 7.0], [1.0, 2.0, 3.0]])
    for kl in (KLInLoss(), KLInLoss(estimator=K3(), level=SequenceLevel())):
        assert torch.equal(kl.in_reward(kl_ref), torch.zeros(2, 3, dtype=torch.float64))
    # negative control: it enters once, at one of the two places
    assert torch.equal(KLInReward().in_reward(kl_ref), kl_ref)


def test_kl_in_the_loss_equals_hand_values(float64):
    # token ratios: log π/π_ref = 1, 2, 3 and 2; as a whole 6 and 2. k2: ½·1, ½·4, ½·9 | 2, and ½·36 | 2
    response = torch.tensor([[True, True, True], [True, False, False]])
    logprobs, ref = float64([[-1.0, -1.0, -1.0], [-1.0, NAN, 0.0]]), float64([[-2.0, -3.0, -4.0], [-3.0, 0.0, NAN]])
    table = {
        (TokenLevel(), None): [[0.5, 2.0, 4.5], [2.0, 0.0, 0.0]],
        (TokenLevel(), TokenLevel()): [[0.5, 2.0, 4.5], [2.0, 0.0, 0.0]],
        (TokenLevel(), SequenceLevel()): [[6.0, 6.0, 6.0], [2.0, 0.0, 0.0]],
        (SequenceLevel(), None): [[18.0], [2.0]],
        (SequenceLevel(), TokenLevel()): [[7.0], [2.0]],
        (SequenceLevel(), SequenceLevel()): [[18.0], [2.0]],
        (GeometricLevel(), None): [[18.0], [2.0]],  # the KL of the whole response, not per token
        (GeometricLevel(), TokenLevel()): [[7.0], [2.0]],
    }
    for (action, at), expected in table.items():
        assert_close(KLInLoss(level=at).in_loss(logprobs, ref, UNASKED, response, action), float64(expected), **TIGHT)
    # k3 of the second response: e⁻² − 1 + 2; the other way round it would be e² − 1 − 2
    k3 = KLInLoss(estimator=K3()).in_loss(logprobs, ref, UNASKED, response, SequenceLevel())
    assert_close(k3[1, 0], float64(math.exp(-2) + 1), **TIGHT)


def test_unbiased_kl_equals_hand_values(float64):
    # log π_θ/π_ref = 1, 2 and log π_θ/π_sampler = log 3, log ½ of the tokens; 3 and log 1.5 of the response
    response = torch.tensor([[True, True, False]])
    logprobs, ref = float64([[-1.0, -1.0, NAN]]), float64([[-2.0, -3.0, 0.0]])
    sampler = float64([[-1.0 - math.log(3), -1.0 + math.log(2), NAN]])
    of_tokens, of_response = [3 * (math.exp(-1) - 1 + 1), (math.exp(-2) - 1 + 2) / 2, 0.0], 1.5 * (math.exp(-3) - 1 + 3)
    for action, at, expected in (
        (TokenLevel(), None, [of_tokens]),
        (SequenceLevel(), None, [[of_response]]),
        (SequenceLevel(), TokenLevel(), [[sum(of_tokens)]]),
        (TokenLevel(), SequenceLevel(), [[of_response / 2, of_response / 2, 0.0]]),
        (GeometricLevel(), None, [[of_response]]),
    ):
        term = KLInLoss(estimator=K3(), level=at, unbiased=True)
        assert_close(term.in_loss(logprobs, ref, sampler, response, action), float64(expected), **TIGHT)
    k1 = KLInLoss(estimator=K1(), unbiased=True).in_loss(logprobs, ref, sampler, response, SequenceLevel())
    assert_close(k1, float64([[4.5]]), **TIGHT)


def test_k2_is_refused_under_the_live_ratio():
    with pytest.raises(ValueError, match="`unbiased` needs an estimator with the value of the KL, which K2 has not"):
        KLInLoss(unbiased=True)
    KLInLoss(estimator=K1(), unbiased=True)


def test_each_argument_of_kl_in_loss_moves_the_loss():
    logprobs, ref, response = step([3, 2], 1)
    losses = [
        KLInLoss(estimator=estimator, level=at).in_loss(logprobs, ref, UNASKED, response, TokenLevel())
        for estimator in (K2(), K3())
        for at in (TokenLevel(), SequenceLevel())
    ]
    for i, a in enumerate(losses):
        for b in losses[:i]:
            assert (a - b).abs().max() > 0.01
    assert KLInLoss() == KLInLoss(estimator=K2(), level=None)


def test_k1_in_the_loss_is_refused_with_a_way_out():
    class Shifted(K1):
        """Still k1."""

    for estimator in (K1(), Shifted()):
        with pytest.raises(ValueError, match=r"`estimator`=K1 does nothing in the loss: its gradient is 0") as error:
            KLInLoss(estimator=estimator)
        for way_out in ("K2", "K3", "KLInReward"):
            assert way_out in str(error.value)


@pytest.mark.parametrize("kind", [K2, K3])
@pytest.mark.parametrize("at", LEVELS, ids=repr)
@pytest.mark.parametrize("action", LEVELS, ids=repr)
def test_padding_changes_nothing(action, at, kind):
    logprobs, ref, response = step([3, 1, 4, 0], 5)
    kl = KLInLoss(estimator=kind(), level=at)
    reference = kl.in_loss(logprobs, ref, UNASKED, response, action)
    wide = torch.full((4, 2), NAN, dtype=torch.float64)
    more = torch.cat([response, torch.zeros(4, 2, dtype=torch.bool)], 1)
    got = kl.in_loss(torch.cat([logprobs, wide], 1), torch.cat([ref, wide], 1), UNASKED, more, action)
    assert_close(got[:, : reference.shape[1]], reference, **TIGHT)
    assert got[:, reference.shape[1] :].eq(0).all()
    assert reference.isfinite().all()


def test_k3_in_the_loss_stays_finite_in_float32():
    # π_θ 100 nats below π_ref: a response of 1000 tokens at 0.1 nats each; the surrogates hold their ratio there
    logprobs = torch.full((1, 1000), -1.0, requires_grad=True)
    everything = torch.ones(1, 1000, dtype=torch.bool)
    kl = KLInLoss(estimator=K3(), level=SequenceLevel())
    loss = kl.in_loss(logprobs, torch.full((1, 1000), -0.9), UNASKED, everything, TokenLevel()).sum()
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logprobs)[0].isfinite().all()


def test_the_classes_are_abstract_where_they_say_so():
    for kind in (KLEstimator, ReferenceKL):
        with pytest.raises(TypeError):
            kind()
