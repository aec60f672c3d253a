"""Inverse-CDF sampling: distributed as softmax, never a token of probability 0."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_rlhf.core import full_precision
from lightning_rlhf.engines import draw as drawing
from lightning_rlhf.engines.draw import draw

JUST_BELOW_ONE = 1 - 2**-53


def uniforms(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverse_cdf(logits: torch.Tensor, u: torch.Tensor, **options: int) -> torch.Tensor:
    return drawing.inverse_cdf(full_precision(logits).softmax(-1), u, **options)


def naive(logits: list[float], u: float) -> int:
    """One running sum in double precision."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    target, total = u * math.fsum(weights), 0.0
    for token, weight in enumerate(weights):
        total += weight
        if total > target:
            return token
    return max(v for v, weight in enumerate(weights) if weight > 0)


def chi_square(tokens: torch.Tensor, logits: list[float]) -> float:
    total = math.fsum(math.exp(x) for x in logits)
    counts = torch.bincount(tokens, minlength=len(logits)).tolist()
    expected = [len(tokens) * math.exp(x) / total for x in logits]
    assert min(expected) > 5
    return sum((seen - e) ** 2 / e for seen, e in zip(counts, expected, strict=True))


@pytest.mark.parametrize("block", [7, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distribution_is_softmax(block, dtype):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    count = 20_000
    tokens = inverse_cdf(logits.expand(count, -1), uniforms(count), block=block)
    critical = 85.35  # 99.9 % quantile of χ² with 49 degrees of freedom
    assert chi_square(tokens, logits.tolist()) < critical
    warmer = inverse_cdf((logits / 1.1).expand(count, -1), uniforms(count), block=block)
    assert chi_square(warmer, logits.tolist()) > critical


@pytest.mark.parametrize(("vocab", "block"), [(1, 256), (10, 4), (36, 36), (37, 36), (300, 256), (513, 64)])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_equals_one_running_sum(vocab, block, spread):
    logits = spread * torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab), dtype=torch.float64)
    u = uniforms(40, seed=block)
    expected = [naive(row, x) for row, x in zip(logits.tolist(), u.tolist(), strict=True)]
    assert inverse_cdf(logits, u, block=block).tolist() == expected
    if vocab > 30 and spread == 1.0:
        assert inverse_cdf(logits, 1 - u, block=block).tolist() != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabulary_in_low_precision(dtype):
    """The sums are exact enough for 50 000 tokens; the reference reads the same rounded logits."""
    logits = torch.randn(24, 50_257, generator=torch.Generator().manual_seed(2)).to(dtype)
    u = uniforms(24, seed=3)
    mass = logits.double().softmax(-1).cumsum(-1)
    expected = [int((row > x).nonzero()[0]) for row, x in zip(mass, u, strict=True)]
    assert inverse_cdf(logits, u).tolist() == expected


def test_block_size_changes_nothing():
    logits = 3 * torch.randn(200, 101, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    u = uniforms(200, seed=5)
    tokens = inverse_cdf(logits, u, block=101)
    assert len(set(tokens.tolist())) > 20
    for block in (1, 2, 10, 100, 256):
        assert torch.equal(inverse_cdf(logits, u, block=block), tokens)


@pytest.mark.parametrize("nothing", [float("-inf"), -300.0])  # exp(−300) is 0 in float32
@pytest.mark.parametrize(
    "dead", [[0], [9], [0, 9], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3, 8, 9], [3, 4, 7, 8]]
)
@pytest.mark.parametrize("block", [4, 256])
def test_tokens_of_probability_zero_are_never_drawn(nothing, dead, block):
    logits = torch.randn(10, generator=torch.Generator().manual_seed(6))
    logits[dead] = nothing
    edges = torch.tensor(
        [0.0, 5e-324, 1e-300, 2**-53, 0.5, 1 - 2**-24, 1 - 2**-52, JUST_BELOW_ONE], dtype=torch.float64
    )
    u = torch.cat([edges, uniforms(500, seed=7)])
    drawn = set(inverse_cdf(logits.expand(len(u), -1), u, block=block).tolist())
    assert drawn == set(range(10)) - set(dead)


@pytest.mark.parametrize("vocab", [10, 36, 257, 5000])
def test_edges_of_the_unit_interval(vocab):
    """u = 0 draws the first possible token, u just below 1 the last; never one past the vocabulary."""
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(vocab))
    assert inverse_cdf(logits, torch.zeros(64, dtype=torch.float64)).tolist() == [0] * 64
    last = inverse_cdf(logits, torch.full((64,), JUST_BELOW_ONE, dtype=torch.float64))
    assert last.tolist() == [vocab - 1] * 64


def test_one_certain_token():
    logits = torch.full((3, 9), float("-inf"))
    logits[torch.arange(3), torch.tensor([0, 4, 8])] = 2.0
    for u in (0.0, 0.3, JUST_BELOW_ONE):
        assert inverse_cdf(logits, torch.full((3,), u, dtype=torch.float64), block=4).tolist() == [0, 4, 8]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_inverse_cdf_says_that_the_policy_diverged(broken):
    logits = torch.zeros(2, 7)
    logits[1, 3] = broken
    with pytest.raises(ValueError, match="not finite: it diverged"):
        inverse_cdf(logits, torch.tensor([0.5, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_draw_keeps_its_digits_under_a_common_offset(offset):
    """Log-prob and entropy of the same float32 logits in float64; the last row is certain of its token."""
    logits = 3 * torch.randn(20, 500, generator=torch.Generator().manual_seed(2)) + offset
    logits[-1, 7] += 1000
    found = draw(logits, uniforms(20), temperature=0.7)
    table = (logits.double() / 0.7).log_softmax(-1)
    assert torch.allclose(found.logprob.double(), table[range(20), found.token], rtol=0, atol=1e-5)
    assert torch.allclose(found.entropy.double(), -(table.exp() * table).sum(-1), rtol=0, atol=2e-5)
    assert bool((found.entropy >= 0).all())


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_draw_says_that_the_policy_diverged(broken, greedy):
    logits = torch.zeros(2, 5)
    logits[1, 3] = broken
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        draw(logits, None if greedy else uniforms(2), temperature=1.0)
