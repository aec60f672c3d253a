"""Waiting prompts take the place of ended responses, and nobody's tokens change by it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from lightning_rlhf.engines import SamplingParams, decode
from lightning_rlhf.engines.slots import Slots
from lightning_rlhf.models.cache import GrowingLayer

PROMPTS = [[12, 13, 14, 15], [10], [20, 21, 22, 23, 24, 25, 26], [33, 11], [7, 8, 9], [30], [18, 19, 28], [35, 35]]
LENGTH = 12
ENDS = [3, 7, 11, 16, 21, 30]
OPTIONS = {"length": LENGTH, "temperature": 0.8, "end_tokens": ENDS, "pad_token": 3}


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def network(request, make_lm):
    if request.param != "mistral":
        return make_lm(request.param).double().eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.4}
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)).double().eval()


@pytest.fixture
def passes(network):
    """(rows, columns) of every forward pass."""
    seen = []
    network.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def numbers(samples=1, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(PROMPTS) * samples, LENGTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("samples", "slots"), [(1, 1), (1, 3), (1, 7), (1, 100), (3, 3), (3, 7), (3, 9)])
def test_slots_change_no_response(network, left_padded, samples, slots):
    batch = left_padded(PROMPTS, fill=29)
    together = decode(network, batch.tokens, batch.mask, numbers(samples), samples=samples, **OPTIONS)
    refilled = decode(network, batch.tokens, batch.mask, numbers(samples), samples=samples, slots=slots, **OPTIONS)
    assert len(set(together.response_mask.sum(1).tolist())) >= 4  # or there is nothing to refill
    assert torch.equal(refilled.tokens, together.tokens)
    assert torch.equal(refilled.response_mask, together.response_mask)
    assert torch.equal(refilled.ended, together.ended)
    assert torch.allclose(refilled.logprobs, together.logprobs, rtol=0, atol=1e-6)  # RMSNorm is float32
    assert torch.allclose(refilled.entropy, together.entropy, rtol=0, atol=1e-6)


def test_greedy_refill_equals_each_prompt_alone(network, left_padded):
    batch = left_padded(PROMPTS, fill=29)
    refilled = decode(network, batch.tokens, batch.mask, None, slots=3, **OPTIONS)
    for i, prompt in enumerate(PROMPTS):
        alone = left_padded([prompt])
        assert torch.equal(decode(network, alone.tokens, alone.mask, None, **OPTIONS).tokens[0], refilled.tokens[i])


def test_sliding_window_is_that_of_whole_passes(left_padded, network):
    """One row, no cache, the whole text at every token: also the negative control that the window matters."""
    batch = left_padded(PROMPTS, fill=29)
    sampled = decode(network, batch.tokens, batch.mask, numbers(), slots=3, **OPTIONS)
    for i, prompt in enumerate(PROMPTS):
        n = int(sampled.response_mask[i].sum())
        row = torch.tensor([prompt + sampled.tokens[i, :n].tolist()])
        with torch.no_grad():
            table = (network(input_ids=row).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
        assert torch.allclose(sampled.logprobs[i, :n], table.gather(1, row[0, -n:, None]).squeeze(1), rtol=0, atol=1e-5)
        entropies = [-math.fsum(math.exp(x) * x for x in row) for row in table.tolist()]
        assert sampled.entropy[i, :n].tolist() == pytest.approx(entropies, abs=1e-5)
        assert not sampled.entropy[i, n:].any()


def test_window_hides_what_lies_outside():
    """Negative control: without its window the same network says something else."""
    sizes = {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4}
    row, found = torch.tensor([PROMPTS[2]]), []
    for window in (4, None):
        torch.manual_seed(0)
        found.append(MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval()(input_ids=row).logits)
    assert float((found[0] - found[1]).abs().max()) > 0.1


def test_passes_follow_the_total_length(network, passes, left_padded):
    """With refill fewer passes than batch after batch, and no pass with more rows than slots."""
    batch, slots = left_padded([p for p in PROMPTS if len(p) > 1] * 5), 4  # a prompt of one would look like a token
    uniforms = torch.rand(len(batch.tokens), LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampled = decode(network, batch.tokens, batch.mask, uniforms, slots=slots, **OPTIONS)
    lengths = sampled.response_mask.sum(1).tolist()
    refilled = [rows for rows, columns in passes if columns == 1]
    reads = [rows for rows, columns in passes if columns > 1]
    assert max(refilled) <= slots
    assert sum(reads) == len(lengths)
    in_turn = sum(max(lengths[i : i + slots]) - 1 for i in range(0, len(lengths), slots))
    assert len(refilled) < 0.8 * in_turn
    assert len(refilled) >= sum(n - 1 for n in lengths) / slots  # no row can be faster than a token a pass


def test_prompts_are_read_in_batches_as_slots_fall_free(network, passes, left_padded):
    batch = left_padded(PROMPTS)
    decode(network, batch.tokens, batch.mask, numbers(2), samples=2, slots=6, **OPTIONS)
    reads = [rows for rows, columns in passes if columns > 1 or rows < 2]
    assert reads[0] == 3  # six slots hold two responses to each of three prompts
    assert max(rows for rows, columns in passes if columns == 1) <= 6


def test_columns_that_only_ended_rows_used_are_cut(make_lm):
    network = make_lm().double().eval()
    live = Slots(network)
    tokens, mask = torch.tensor([[2, 2, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    with torch.no_grad():
        live.admit(torch.arange(2), tokens, mask, samples=1)
        live.advance(torch.tensor([11, 12]))
        assert live.mask.shape == (2, 5)
        live.open = torch.tensor([True, False])
        live.drop_closed()
        assert live.mask.tolist() == [[True, True, True]]
        assert live.cache.layers[0].keys.shape[2] == 3
        live.advance(torch.tensor([13]))
        alone = network(input_ids=torch.tensor([[5, 6, 11, 13]])).logits[:, -1]
    assert torch.allclose(live.logits, alone, rtol=0, atol=1e-10)


def test_growing_cache_keeps_what_it_holds():
    layer, whole = GrowingLayer(), []
    for width in (3, 1, 1, 70, 1, 1):
        states = torch.randn(2, 1, width, 4)
        whole.append(states)
        keys, values = layer.update(states, states + 1)
        assert torch.equal(keys, torch.cat(whole, 2))
        assert torch.equal(values, torch.cat(whole, 2) + 1)
    held = keys.clone()
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]  # a row leaves
    states = torch.randn(1, 1, 1, 4)
    assert torch.equal(layer.update(states, states)[0], torch.cat([held[:1], states], 2))


@pytest.mark.parametrize("slots", [0, 1, 2])
def test_slots_that_hold_no_prompt_are_refused(network, left_padded, slots):
    batch = left_padded(PROMPTS)
    with pytest.raises(ValueError, match=f"slots={slots}"):
        decode(network, batch.tokens, batch.mask, None, samples=3, slots=slots, **OPTIONS)
    with pytest.raises(ValueError, match=f"slots={slots} for samples_per_prompt=3"):
        SamplingParams(samples_per_prompt=3, slots=slots)
