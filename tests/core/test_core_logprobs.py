import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import full_precision, token_logprobs

TIGHT = {"rtol": 0, "atol": 1e-9}


def test_token_logprobs_equal_hand_values(float64):
    # logits log 1, log 2, log 5 give 1/8, 2/8, 5/8
    logits = float64([[0.0, math.log(2), math.log(5)]]).expand(3, 3)
    expected = float64([math.log(1 / 8), math.log(2 / 8), math.log(5 / 8)])
    assert_close(token_logprobs(logits, torch.tensor([0, 1, 2])), expected, **TIGHT)


def test_temperature_divides_logits_before_the_softmax(float64):
    # τ = 0.5 squares the weights 1, 2, 5: 1/30, 4/30, 25/30; τ = 2 takes roots: 1, √2, √5
    logits = float64([0.0, math.log(2), math.log(5)])
    assert_close(token_logprobs(logits, torch.tensor(1), 0.5), float64(math.log(4 / 30)), **TIGHT)
    total = 1 + math.sqrt(2) + math.sqrt(5)
    assert_close(token_logprobs(logits, torch.tensor(1), 2.0), float64(math.log(math.sqrt(2) / total)), **TIGHT)
    # negative control: dividing the log-prob instead is another number
    assert abs(math.log(2 / 8) / 0.5 - math.log(4 / 30)) > 0.1


def test_token_logprobs_are_unmoved_by_a_shift_of_the_logits(float64):
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    assert_close(token_logprobs(logits + 700.0, tokens, 0.7), token_logprobs(logits, tokens, 0.7), **TIGHT)


def test_probabilities_of_all_tokens_sum_to_one():
    logits = 30 * torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    each = torch.stack([token_logprobs(logits, torch.full((4,), v), 1.3) for v in range(6)])
    assert each.le(0).all()
    assert_close(each.exp().sum(0), torch.ones(4, dtype=torch.float64), **TIGHT)


def test_token_logprobs_gradient_is_onehot_less_softmax_over_temperature(float64):
    # ∂ log π(1) / ∂ logit_v = (1[v = 1] − π_v)/τ; τ = 0.5: π = 1/30, 4/30, 25/30
    logits = float64([0.0, math.log(2), math.log(5)], requires_grad=True)
    token_logprobs(logits, torch.tensor(1), 0.5).backward()
    assert_close(logits.grad, float64([-2 / 30, 2 * 26 / 30, -50 / 30]), **TIGHT)


def test_a_forbidden_token_leaves_the_others_finite(float64):
    # −inf on one logit, as a suppressed token has: the other two share the mass, 1/3 and 2/3
    logits = float64([0.0, math.log(2), -math.inf])
    assert_close(token_logprobs(logits, torch.tensor(1)), float64(math.log(2 / 3)), **TIGHT)
    assert token_logprobs(logits, torch.tensor(2)) == -math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_give_float32(dtype):
    logits = torch.tensor([[0.5, 1.5, -2.0]], dtype=dtype)  # exact in every dtype
    wide = logits.double()
    got = token_logprobs(logits, torch.tensor([1]), 0.7)
    assert got.dtype == torch.float32
    # 1e-6: float32 arithmetic on the same inputs; bfloat16 arithmetic would be off by 1e-3
    assert_close(got.double(), wide.div(0.7).log_softmax(-1)[:, 1], rtol=0, atol=1e-6)


def test_full_precision_keeps_float64_and_widens_the_rest():
    assert full_precision(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert full_precision(torch.zeros(1, dtype=dtype)).dtype == torch.float32


def test_token_logprobs_refuse_tokens_of_another_shape():
    with pytest.raises(ValueError, match=r"without its last axis, \(2, 3\): got \(3,\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_keep_their_digits_under_a_common_offset(offset, temperature):
    """Of the same float32 logits in float64."""
    logits = 3 * torch.randn(20, 500, generator=torch.Generator().manual_seed(2)) + offset
    tokens = torch.arange(20)
    expected = (logits.double() / temperature).log_softmax(-1)[range(20), tokens]
    assert_close(token_logprobs(logits, tokens, temperature).double(), expected, rtol=0, atol=5e-6)
