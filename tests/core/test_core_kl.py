import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import k1, k2, k3

TIGHT = {"rtol": 0, "atol": 1e-9}
REF = torch.tensor([0.7, 0.1, 0.15, 0.05], dtype=torch.float64)


def policy():
    """Logits of π and log π over four actions, all of which are enumerated."""
    logits = torch.tensor([0.3, -0.8, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    return logits, logits.log_softmax(0)


def kl(p, q):
    """KL(p‖q) from its definition."""
    return (p * (p.log() - q.log())).sum()


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def test_estimators_equal_hand_values(float64):
    # log π − log ρ = log 2, so ρ/π = ½: k1 = log 2, k2 = ½ log² 2, k3 = ½ − 1 + log 2
    x = float64(math.log(2))
    assert_close(k1(x), float64(math.log(2)), **TIGHT)
    assert_close(k2(x), float64(0.5 * math.log(2) ** 2), **TIGHT)
    assert_close(k3(x), float64(math.log(2) - 0.5), **TIGHT)
    # negative control: with the log-ratio the other way round ρ/π = 2 and k3 = 2 − 1 − log 2
    assert_close(k3(-x), float64(1 - math.log(2)), **TIGHT)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    logp = policy()[1].detach()
    p = logp.exp()
    log_ratio = logp - REF.log()
    expected = kl(p, REF)
    assert_close((p * k1(log_ratio)).sum(), expected, **TIGHT)
    assert_close((p * k3(log_ratio)).sum(), expected, **TIGHT)
    assert abs(float((p * k2(log_ratio)).sum() - expected)) > 0.01
    # negative control: the other direction of the KL is another number
    assert abs(float(kl(REF, p) - expected)) > 0.01


def test_k3_is_never_negative_and_keeps_small_ratios():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert k3(x).ge(0).all()
    assert k2(x).ge(0).all()
    assert k1(x).lt(0).any()
    # near 0, k3 ≈ x²/2 − x³/6 = 5e-7; exp(−x) − 1 would be off by 6e-8. 1e-9: float32 rounds 1e-3 by 6e-11
    small = torch.tensor([1e-3, -1e-3])
    assert_close(k3(small), small**2 / 2 - small**3 / 6, rtol=0, atol=1e-9)


def test_estimators_vanish_with_zero_gradient_at_equal_policies(float64):
    x = float64([0.0, 0.0], requires_grad=True)
    assert torch.equal(k3(x), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(k3(x).sum(), x)[0], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(k2(x).sum(), x)[0], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(torch.autograd.grad(k1(x).sum(), x)[0], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradient_as_a_loss_is_the_published_one(estimator):
    # samples from π are held fixed, the gradient flows through the estimator alone (Tang & Munos 2025)
    logits, logp = policy()
    got = gradient((logp.exp().detach() * estimator(logp - REF.log())).sum(), logits)
    reverse, forward = gradient(kl(logits.softmax(0), REF), logits), gradient(kl(REF, logits.softmax(0)), logits)
    table = {k1: torch.zeros_like(reverse), k2: reverse, k3: forward}
    assert_close(got, table[estimator], **TIGHT)
    # negative control: the three columns of the table are three different vectors
    for other in {k1, k2, k3} - {estimator}:
        assert (got - table[other]).abs().max() > 0.01


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradient_in_the_reward_is_the_published_one(estimator):
    # the estimator is detached and weighs ∇ log π
    logits, logp = policy()
    got = gradient((logp.exp().detach() * logp * estimator(logp - REF.log()).detach()).sum(), logits)
    reverse, forward = gradient(kl(logits.softmax(0), REF), logits), gradient(kl(REF, logits.softmax(0)), logits)
    if estimator is k1:
        assert_close(got, reverse, **TIGHT)
    else:
        assert (got - reverse).abs().max() > 0.01
    if estimator is k3:
        assert_close(got, reverse - forward, **TIGHT)
