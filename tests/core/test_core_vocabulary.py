"""Entropy and exact KL over the vocabulary, block by block, against dense autograd; the entropy bonus."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.core import AdaptiveEntropy, EntropyBonus
from lightning_rlhf.core.vocabulary import Predictions, vocabulary_sums

N, D, V = 7, 5, 11


def predictions(seed: int, *, bias: bool = True, dense: bool = False, width: int = D, vocabulary: int = V):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    if dense:
        return Predictions(draw(N, vocabulary))
    return Predictions(draw(N, width), draw(vocabulary, width), draw(vocabulary) if bias else None)


def dense(of: Predictions, temperature: float) -> torch.Tensor:
    logits = of.inputs if of.weight is None else of.inputs @ of.weight.T + (0 if of.bias is None else of.bias)
    return (logits / temperature).softmax(1)


def gradients(total: torch.Tensor, of: Predictions) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [part for part in of if part is not None], retain_graph=True))


@pytest.mark.parametrize("block", [1, 2 * V, 3 * V, 10**6])
@pytest.mark.parametrize("kind", [{}, {"bias": False}, {"dense": True}])
def test_sums_and_gradients_are_those_of_the_whole_logits(block, kind):
    policy, reference = predictions(0, **kind), predictions(1, width=4)
    price = torch.linspace(-1, 2, N, dtype=torch.float64)
    found = vocabulary_sums(policy, reference, temperature=0.7, block=block)
    p, q = dense(policy, 0.7), dense(reference, 0.7).detach()
    entropy, kl = -(p * p.log()).sum(1), (p * (p / q).log()).sum(1)
    assert torch.allclose(found.entropy, entropy, atol=1e-12)
    assert torch.allclose(found.kl_ref, kl, atol=1e-12)
    for value, expected in ((found.entropy, entropy), (found.kl_ref, kl)):
        for a, b in zip(gradients(price @ value, policy), gradients(price @ expected, policy), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    assert not torch.allclose(found.kl_ref, (q * (q / p).log()).sum(1), atol=1e-3)  # the other direction


def test_reference_gets_no_gradient():
    policy, reference = predictions(0), predictions(1)
    vocabulary_sums(policy, reference, temperature=1.0).kl_ref.sum().backward()
    assert policy.weight.grad is not None
    assert reference.weight.grad is None


def test_kl_to_itself_is_zero_with_zero_gradient():
    policy = predictions(0)
    found = vocabulary_sums(policy, policy, temperature=1.0)
    assert float(found.kl_ref.abs().max()) < 1e-15
    assert max(float(g.abs().max()) for g in gradients(found.kl_ref.sum(), policy)) < 1e-14


def test_without_reference_the_kl_is_zero():
    found = vocabulary_sums(predictions(0), None, temperature=1.0)
    assert not found.kl_ref.any()
    assert found.entropy.min() > 0


@pytest.mark.parametrize(("own", "other"), [(V, V + 3), (V + 3, V)])
def test_vocabulary_that_is_padded_further_is_compared_on_what_both_share(own, other):
    policy, reference = predictions(0, vocabulary=own), predictions(1, vocabulary=other)
    found = vocabulary_sums(policy, reference, temperature=0.9)
    p, q = (dense(of, 0.9)[:, :V] for of in (policy, reference))
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    assert torch.allclose(found.kl_ref, (p * (p / q).log()).sum(1), atol=1e-12)
    whole = dense(policy, 0.9)
    assert torch.allclose(found.entropy, -(whole * whole.log()).sum(1), atol=1e-12)


def test_other_positions_are_refused():
    policy = predictions(0)
    with pytest.raises(ValueError, match="positions"):
        vocabulary_sums(policy, Predictions(policy.inputs[:-1], policy.weight, policy.bias), temperature=1.0)


def test_logprobs_of_chosen_tokens():
    policy = predictions(0)
    tokens = torch.arange(N)
    expected = dense(policy, 1.3).log()[torch.arange(N), tokens]
    assert torch.allclose(policy.logprobs(tokens, temperature=1.3), expected, atol=1e-12)


# The bonus


def test_fixed_price_stays():
    bonus = EntropyBonus(coef=0.02)
    assert bonus.adapted(0.01) == bonus
    assert bonus.price == 0.02


def test_adaptive_price_by_hand():
    bonus = AdaptiveEntropy(coef=0.01, target=0.5, step=0.004, largest=0.012)
    assert bonus.price == 0.0  # nothing was measured yet
    walked = []
    for entropy in (0.4, 0.5, 0.6, 0.9, 0.9, 0.9, 0.3):
        bonus = bonus.adapted(entropy)
        walked.append((round(bonus.coef, 6), round(bonus.price, 6)))
    assert walked == [
        (0.012, 0.012),  # raised, and held by the upper bound
        (0.012, 0.012),
        (0.008, 0.0),  # above the target nothing is charged
        (0.004, 0.0),
        (0.0, 0.0),
        (0.0, 0.0),
        (0.004, 0.004),  # a price of 0 does not stop the adaptation
    ]


def test_adaptive_price_is_restored():
    bonus = AdaptiveEntropy(coef=0.01, target=0.5).adapted(0.2)
    assert AdaptiveEntropy(coef=0.01, target=0.5).restored(bonus.state()) == bonus
    assert bonus.state() == {"coef": pytest.approx(0.015), "entropy": 0.2}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: EntropyBonus(coef=0.0), "coef"),
        (lambda: AdaptiveEntropy(target=0.0), "target"),
        (lambda: AdaptiveEntropy(step=-1.0), "step"),
        (lambda: AdaptiveEntropy(smallest=1.0), "smallest"),
        (lambda: AdaptiveEntropy().adapted(math.nan), "entropy"),
    ],
)
def test_impossible_bonuses_are_refused(make, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        make()
