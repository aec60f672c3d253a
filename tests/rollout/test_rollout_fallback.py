"""Transformers' `generate` where the decode loop does not know the cache: the same responses."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from lightning_rlhf.engines import LocalEngine, SamplingParams, decode, sample
from lightning_rlhf.engines.hf_generate import generate
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.models.cache import why_no_cache

PROMPTS = [[12, 13, 14, 15], [10], [20, 21, 22], [33, 11]]
LENGTH = 10
OPTIONS = {"length": LENGTH, "temperature": 0.8, "end_tokens": [3, 7, 11, 16, 21, 30], "pad_token": 3}


def mamba():
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=36, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=3, pad_token_id=3
    )
    return MambaForCausalLM(config).eval()


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generate_gives_what_decode_gives(make_lm, left_padded, kind, greedy):
    network, batch = make_lm(kind).double().eval(), left_padded(PROMPTS, fill=29)
    network.generation_config.repetition_penalty = 3.0  # a default that would bias the log-probs
    generator = torch.Generator().manual_seed(5)
    uniforms = None if greedy else torch.rand(8, LENGTH, generator=generator, dtype=torch.float64)
    one, other = (f(network, batch.tokens, batch.mask, uniforms, samples=2, **OPTIONS) for f in (decode, generate))
    assert len(set(one.response_mask.sum(1).tolist())) >= (1 if greedy else 3)
    for field, expected in zip(other, one, strict=True):
        assert torch.allclose(field.double(), expected.double(), rtol=0, atol=1e-5)
    assert network.generation_config.repetition_penalty == 3.0


def test_network_without_such_a_cache_falls_back_and_says_why(left_padded, caplog):
    network = mamba()
    assert why_no_cache(network)
    batch = left_padded([[12, 13, 14], [20, 21, 22]])
    uniforms = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="lightning_rlhf"):
        sampled = sample(PolicyModel(network), batch, uniforms, SamplingParams(max_new_tokens=LENGTH))
    assert "sampling by transformers' `generate`" in caplog.text
    for i in range(2):
        n = int(sampled.response_mask[i].sum())
        row = torch.cat([batch.tokens[i], sampled.tokens[i, :n]]).unsqueeze(0)
        with torch.no_grad():
            table = network(input_ids=row).logits[0, -n - 1 : -1].log_softmax(-1)
        expected = table.gather(1, row[0, -n:, None]).squeeze(1)
        assert torch.allclose(sampled.logprobs[i, :n], expected, rtol=0, atol=1e-3)


def test_known_networks_do_not_fall_back(make_lm, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_rlhf"):
        LocalEngine().load(PolicyModel(make_lm()), version=0)
    assert not caplog.text
