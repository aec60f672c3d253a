"""Log-probs from hidden states, against whole logits and autograd through them."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.core import linear_logprobs as module
from lightning_rlhf.core.linear_logprobs import linear_logprobs

N, D, V = 11, 5, 13


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    hidden, weight, bias = (torch.randn(shape, **options) for shape in ((N, D), (V, D), (V,)))
    return hidden, weight, bias, torch.randint(V, (N,), generator=generator)


def whole(hidden, weight, bias, tokens, temperature):
    """By the whole (N, V) table."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    return (logits / temperature).log_softmax(1)[range(N), tokens]


@pytest.mark.parametrize("block", [1, 2 * V, 3 * V + 1, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_those_of_whole_logits(inputs, block, temperature, with_bias):
    hidden, weight, bias, tokens = inputs
    bias = bias if with_bias else None
    leaves = [hidden, weight] + ([bias] if with_bias else [])
    upstream = torch.linspace(-2, 3, N, dtype=torch.float64)
    found = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, block=block)
    expected = whole(hidden, weight, bias, tokens, temperature)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((x * upstream).sum(), leaves) for x in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
        assert one.abs().max() > 0.1


def test_temperature_matters(inputs):
    hidden, weight, bias, tokens = inputs
    one, other = (linear_logprobs(hidden, weight, tokens, bias=bias, temperature=t) for t in (1.0, 0.7))
    assert float((one - other).abs().max()) > 0.1


def test_gradcheck(inputs):
    hidden, weight, bias, tokens = inputs
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, tokens, bias=b, temperature=0.8, block=4 * V), (hidden, weight, bias)
    )


def test_frozen_head_gets_no_gradient(inputs):
    hidden, weight, _, tokens = inputs
    linear_logprobs(hidden, weight.detach(), tokens).sum().backward()
    assert hidden.grad is not None
    found = linear_logprobs(hidden.detach(), weight, tokens)
    found.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(("block", "rows"), [(3 * V, [3, 3, 3, 2]), (1, [1] * N), (N * V, [N])])
def test_logits_exist_a_block_at_a_time(inputs, monkeypatch, block, rows):
    hidden, weight, _, tokens = inputs
    seen = []

    def watched(*args):
        seen.append(torch.nn.functional.linear(*args))
        return seen[-1]

    monkeypatch.setattr(module, "linear", watched)
    found = linear_logprobs(hidden, weight, tokens, block=block)
    assert [len(logits) for logits in seen] == rows
    seen.clear()
    found.sum().backward()
    assert [len(logits) for logits in seen] == rows  # computed again, not kept


def test_float32_keeps_its_tolerance(inputs):
    hidden, weight, bias, tokens = inputs
    found = linear_logprobs(hidden.float(), weight.float(), tokens, bias=bias.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), whole(hidden, weight, bias, tokens, 1.0), rtol=0, atol=1e-5)


def test_autocast_multiplies_in_its_dtype(inputs):
    """Float32 out, the product rounded: as `linear` and `log_softmax` under autocast."""
    hidden, weight, _, tokens = (x if x.dtype == torch.int64 else x.detach().float().requires_grad_() for x in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_logprobs(hidden, weight, tokens)
        logits = torch.nn.functional.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        expected = logits.float().log_softmax(1)[range(N), tokens]
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    exact = whole(hidden, weight, None, tokens, 1.0)
    assert float((found - exact).abs().max()) > 1e-4
    found.sum().backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    (of_hidden,) = torch.autograd.grad(exact.sum(), hidden)
    assert torch.allclose(hidden.grad, of_hidden, rtol=0, atol=0.05)  # bfloat16 has 8 bits


def test_no_rows_give_no_logprobs(inputs):
    hidden, weight, _, tokens = inputs
    found = linear_logprobs(hidden[:0], weight, tokens[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize("wrong", ["hidden", "weight", "tokens"])
def test_shapes_that_do_not_match_are_refused(inputs, wrong):
    hidden, weight, _, tokens = inputs
    given = {"hidden": hidden, "weight": weight, "tokens": tokens}
    given[wrong] = given[wrong][1:] if wrong == "tokens" else given[wrong][:, 1:]
    with pytest.raises(ValueError, match=r"hidden \(N, d\), weight \(V, d\)"):
        linear_logprobs(**given)


def test_common_offset_of_the_logits_costs_no_digits():
    """A bias of 1e4 on every token; value and gradient in float64, of the logits as float32 holds them."""
    hidden, weight = torch.eye(V), torch.randn(V, V, generator=torch.Generator().manual_seed(0))  # W·h has no rounding
    bias, tokens = torch.full((V,), 1e4), torch.arange(V)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    found = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=0.7)
    logits = (weight.t() + bias).detach().double().requires_grad_()
    expected = (logits / 0.7).log_softmax(1)[range(V), tokens]
    assert torch.allclose(found.double(), expected, rtol=0, atol=5e-6)
    upstream = torch.linspace(-2, 3, V)
    (of_bias,) = torch.autograd.grad((found * upstream).sum(), [bias])
    (of_logits,) = torch.autograd.grad((expected * upstream.double()).sum(), [logits])
    assert torch.allclose(of_bias.double(), of_logits.sum(0), rtol=0, atol=5e-6)
