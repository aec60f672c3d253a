"""The weights that sample: the policy's, or a low-precision copy of today's."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from lightning_rlhf.engines import SamplingParams, decode, sample
from lightning_rlhf.models import PolicyModel

PROMPTS = [[12, 13, 14], [10], [20, 21], [33, 11]]
LENGTH = 8


@pytest.fixture
def policy(make_lm):
    return PolicyModel(make_lm("llama").eval())


@pytest.fixture
def watched(policy):
    """The policy, and (dtype of the weights, of the logits, autocast) of each of its passes and its copies'."""
    seen = []

    def watch(module, inputs, output):
        seen.append((next(module.parameters()).dtype, output.logits.dtype, torch.is_autocast_enabled("cpu")))

    policy.network.register_forward_hook(watch)
    return policy, seen


def numbers():
    return torch.rand(len(PROMPTS), LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(policy, batch, uniforms, dtype):
    network = copy.deepcopy(policy.network)
    for p in network.parameters():
        p.data = p.data.to(dtype)  # the buffers stay in float32, as `from_pretrained(dtype=...)` leaves them
    options = {"length": LENGTH, "temperature": 0.9, "end_tokens": [0], "pad_token": 0}
    return decode(network, batch.tokens, batch.mask, uniforms, **options)


def test_policy_itself_samples_in_its_own_dtype(watched, left_padded):
    policy, seen = watched
    batch = left_padded(PROMPTS)
    sampled = sample(policy, batch, numbers(), SamplingParams(max_new_tokens=LENGTH, temperature=0.9))
    assert {first for first, *_ in seen} == {torch.float32}
    assert torch.equal(sampled.tokens, by_hand(policy, batch, numbers(), torch.float32).tokens)
    greedy = sample(policy, batch, None, SamplingParams(max_new_tokens=LENGTH, temperature=0.9))
    assert torch.equal(greedy.tokens, by_hand(policy, batch, None, torch.float32).tokens)
    assert not torch.equal(greedy.tokens, sampled.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_copy_follows_the_policy(policy, left_padded, dtype):
    batch = left_padded(PROMPTS)
    sampler = partial(sample, policy, params=SamplingParams(max_new_tokens=LENGTH, temperature=0.9, dtype=dtype))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    first = sampler(batch, numbers())
    for name, p in policy.named_parameters():
        assert p.dtype == torch.float32
        assert p.requires_grad
        assert torch.equal(p, before[name])
    assert torch.equal(first.tokens, by_hand(policy, batch, numbers(), getattr(torch, dtype)).tokens)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.ones_like(p).cumsum(0).cos())
    second = sampler(batch, numbers())
    assert torch.equal(second.tokens, by_hand(policy, batch, numbers(), getattr(torch, dtype)).tokens)
    assert not torch.equal(second.tokens, first.tokens)


def test_autocast_is_off_inside_and_decides_the_copy(watched, left_padded):
    policy, seen = watched
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(policy, left_padded(PROMPTS), numbers(), SamplingParams(max_new_tokens=LENGTH))
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, False)}
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(policy, left_padded(PROMPTS), numbers(), SamplingParams(max_new_tokens=LENGTH, dtype="float32"))
    assert set(seen) == {(torch.float32, torch.float32, False)}


def test_copy_follows_a_change_of_precision(watched, left_padded):
    policy, seen = watched
    sampler = partial(sample, policy, params=SamplingParams(max_new_tokens=2))
    for dtype in (torch.bfloat16, torch.float16):
        seen.clear()
        with torch.autocast("cpu", dtype=dtype):
            sampler(left_padded(PROMPTS), numbers())
        assert {first for first, *_ in seen} == {dtype}


def test_copy_keeps_float32_buffers(policy, left_padded):
    """Rotary frequencies rounded to bfloat16 turn far positions by whole radians."""
    found = []
    policy.network.model.rotary_emb.register_forward_pre_hook(lambda module, _: found.append(module.inv_freq.dtype))
    sample(policy, left_padded(PROMPTS), numbers(), SamplingParams(max_new_tokens=2, dtype="bfloat16"))
    assert set(found) == {torch.float32}


def test_responses_end_at_the_policy_s_end_tokens(make_lm, left_padded):
    network = make_lm().double().eval()
    network.generation_config.eos_token_id = [17, 5, 9, 30, 21]
    batch = left_padded(PROMPTS)
    sampled = sample(PolicyModel(network), batch, numbers(), SamplingParams(max_new_tokens=LENGTH))
    assert sampled.ended.any()
    for tokens, response, ended in zip(*(f.tolist() for f in sampled[:3]), strict=True):
        n = sum(response)
        assert ended == (tokens[n - 1] in (17, 5, 9, 30, 21))
        assert not set(tokens[: n - 1]) & {17, 5, 9, 30, 21}
        assert tokens[n:] == [17] * (LENGTH - n)
    assert sampled.tokens.shape == (len(PROMPTS), LENGTH)


def test_rollouts_stop_at_what_any_of_template_tokenizer_and_config_names(make_lm, left_padded, toy_tokenizer):
    """4 ends a turn by the template, 0 a text by the tokenizer, and the generation config names 9."""
    network = make_lm("llama", end=9).eval()
    policy, prompts = PolicyModel(network, toy_tokenizer), [[3, 5, 10, 4, 3, 6], [10, 11]]  # a dialogue, and a text
    uniforms = torch.rand(400, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = sample(policy, left_padded(prompts), uniforms, SamplingParams(max_new_tokens=LENGTH), samples=200)
    last = found.tokens[torch.arange(400), found.tokens.shape[1] - LENGTH + found.response_mask.sum(1) - 1]
    assert torch.equal(found.ended, torch.isin(last, torch.tensor([0, 4, 9])))
    for answers in (slice(0, 200), slice(200, 400)):
        assert set(last[answers][found.ended[answers]].tolist()) == {0, 4, 9}
