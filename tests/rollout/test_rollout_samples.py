"""Several responses to each prompt: one prefill gives what repeated prompts give, and the rows say whose they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_rlhf.engines import LocalEngine, SamplingParams, decode, row_uniforms
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.rollout import Collector, UpdateSchedule

PROMPTS = [[12, 13, 14, 15], [10], [20, 21, 22, 23, 24, 25, 26], [33, 11], [17, 18, 19]]
LENGTH, K = 12, 3
ENDS = [3, 7, 11, 16, 21, 30]
OPTIONS = {"length": LENGTH, "temperature": 0.8, "end_tokens": ENDS, "pad_token": 3}
NOBODY = SimpleNamespace(networks=list)  # a reward without networks


@pytest.fixture(params=["gpt2", "llama"])
def network(request, make_lm):
    return make_lm(request.param, end=ENDS).double().eval()


@pytest.fixture
def passes(network):
    """(rows, columns) of every forward pass."""
    seen = []
    network.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def numbers(rows: int, seed: int = 5) -> torch.Tensor:
    return torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def repeated(batch, k: int):
    return batch.tokens.repeat_interleave(k, 0), batch.mask.repeat_interleave(k, 0)


def naive_response(network, prompt, uniforms):
    """One row, no cache, no padding, a plain running sum over the vocabulary."""
    tokens, logprobs = list(prompt), []
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([tokens])).logits[0, -1].double() / 0.8
        total, token = 0.0, None
        for v, p in enumerate(logits.softmax(-1).tolist()):
            total += p
            if token is None and total > u:
                token = v
        tokens.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if token in ENDS:
            break
    return tokens[len(prompt) :], logprobs


# Decoding


@pytest.mark.parametrize("k", [2, 3, 5])
def test_samples_equal_repeated_prompts(network, left_padded, k):
    batch, uniforms = left_padded(PROMPTS, fill=29), numbers(len(PROMPTS) * k)
    once = decode(network, batch.tokens, batch.mask, uniforms, samples=k, **OPTIONS)
    tokens, mask = repeated(batch, k)
    expected = decode(network, tokens, mask, uniforms, **OPTIONS)
    assert torch.equal(once.tokens, expected.tokens)
    assert torch.equal(once.response_mask, expected.response_mask)
    assert torch.equal(once.ended, expected.ended)
    assert torch.allclose(once.logprobs, expected.logprobs, rtol=0, atol=1e-9)
    assert once.tokens.shape == (len(PROMPTS) * k, LENGTH)
    assert len(set(once.response_mask.sum(1).tolist())) >= 3  # rows left at different times
    tokens, mask = batch.tokens.repeat(k, 1), batch.mask.repeat(k, 1)  # the other order: prompt 0, 1, …, 0, 1, …
    other = decode(network, tokens, mask, uniforms, **OPTIONS)
    assert not torch.equal(once.tokens, other.tokens)


def test_samples_equal_a_loop_without_cache(network, left_padded):
    batch, uniforms = left_padded(PROMPTS, fill=29), numbers(len(PROMPTS) * K)
    sampled = decode(network, batch.tokens, batch.mask, uniforms, samples=K, **OPTIONS)
    for i, prompt in enumerate(PROMPTS):
        for j in range(K):
            row = i * K + j
            tokens, logprobs = naive_response(network, prompt, uniforms[row])
            n = len(tokens)
            assert sampled.tokens[row].tolist() == tokens + [3] * (LENGTH - n)
            assert sampled.response_mask[row].tolist() == [True] * n + [False] * (LENGTH - n)
            assert sampled.logprobs[row, :n].tolist() == pytest.approx(logprobs, abs=1e-9)
            assert bool(sampled.ended[row]) == (tokens[-1] in ENDS)


def test_prompts_are_read_once(network, passes, left_padded):
    batch, uniforms = left_padded(PROMPTS), numbers(len(PROMPTS) * K)
    sampled = decode(network, batch.tokens, batch.mask, uniforms, samples=K, **OPTIONS)
    lengths = sampled.response_mask.sum(1).tolist()
    size, expected = len(PROMPTS) * K, [(len(PROMPTS), 7)]  # B rows of the longest prompt's 7 tokens
    for t in range(1, max(lengths)):
        still = sum(n > t for n in lengths)
        size = still if still <= 0.75 * size else size
        expected.append((size, 1))
    assert passes == expected
    assert len({rows for rows, columns in passes if columns == 1}) >= 3  # ended rows left more than once
    passes.clear()
    decode(network, *repeated(batch, K), uniforms, **OPTIONS)
    assert passes[0] == (len(PROMPTS) * K, 7)  # what the prefill would cost otherwise


def test_greedy_samples_of_a_prompt_are_alike(network, left_padded):
    batch = left_padded(PROMPTS)
    alone = decode(network, batch.tokens, batch.mask, None, **OPTIONS)
    sampled = decode(network, batch.tokens, batch.mask, None, samples=K, **OPTIONS)
    assert torch.equal(sampled.tokens, alone.tokens.repeat_interleave(K, 0))


def test_one_sample_is_bit_identical_to_none_asked_for(network, left_padded):
    batch, uniforms = left_padded(PROMPTS), numbers(len(PROMPTS))
    one = decode(network, batch.tokens, batch.mask, uniforms, samples=1, **OPTIONS)
    plain = decode(network, batch.tokens, batch.mask, uniforms, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(one, plain, strict=True))


def test_adapted_network_samples_as_its_merged_one(make_lm, left_padded):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    torch.manual_seed(1)
    network = peft.get_peft_model(make_lm().double().eval(), config)
    batch, uniforms = left_padded(PROMPTS), numbers(len(PROMPTS) * K)
    adapted = decode(network, batch.tokens, batch.mask, uniforms, samples=K, **OPTIONS)
    merged = decode(network.merge_and_unload(), *repeated(batch, K), uniforms, **OPTIONS)
    assert torch.equal(adapted.tokens, merged.tokens)


# Collecting


@pytest.fixture
def collect(make_lm, left_padded):
    """A rollout of `k` responses to each prompt; the reference is another network."""

    def run(kind="gpt2", prompts=PROMPTS, *, k=K, rank=0, world=1, microbatch=None, **generation):
        policy = PolicyModel(make_lm(kind, end=ENDS).double().eval())
        reference = PolicyModel(make_lm(kind, end=ENDS, seed=4).double().eval())
        setting = SamplingParams(**({"max_new_tokens": LENGTH, "temperature": 0.8, "seed": 9} | generation))
        ranks = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        sizes = {"generation": setting, "updates": UpdateSchedule(microbatch=microbatch), "engine": LocalEngine()}
        collector = Collector(policy, Reference(policy, reference), None, NOBODY, ranks=ranks, **sizes)
        batch = left_padded(prompts, fill=29)
        rollout = collector.collect(batch, samples=k, iteration=2)
        return rollout, policy.network, reference.network

    return run


def text_of(rollout, i: int) -> list[int]:
    return rollout.tokens[i, rollout.prompt_width :][: int(rollout.lengths[i])].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("microbatch", [None, 4])
def test_rollout_says_which_prompt_each_row_answers(collect, kind, microbatch):
    rollout, network, reference = collect(kind, microbatch=microbatch)  # 15 rows, in pieces of 4 that cut prompts apart
    assert rollout.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert len(rollout) == 15
    assert len(set(rollout.lengths.tolist())) >= 3
    for i, group in enumerate(rollout.prompt_index.tolist()):
        prompt, n = PROMPTS[group], int(rollout.lengths[i])
        before = rollout.tokens[i, : rollout.prompt_width][rollout.attention_mask[i, : rollout.prompt_width]]
        assert before.tolist() == prompt
        row = torch.tensor([prompt + text_of(rollout, i)])
        for model, found in ((network, rollout.logprobs), (reference, rollout.ref_logprobs)):
            with torch.no_grad():
                logprobs = (model(input_ids=row).logits[0, -n - 1 : -1] / 0.8).log_softmax(-1)
            wanted = logprobs.gather(1, row[0, -n:, None]).squeeze(1)
            # Llama's norm computes in float32 whatever its weights are
            assert torch.allclose(found[i, :n], wanted, rtol=0, atol=1e-9 if kind == "gpt2" else 1e-5)
            assert not found[i, n:].any()
    gap = (rollout.sampler_logprobs - rollout.logprobs).abs().max()
    assert gap <= (1e-9 if kind == "gpt2" else 1e-5)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 1e-2


def test_responses_to_one_prompt_differ(collect):
    rollout, *_ = collect(k=4)
    for group in range(len(PROMPTS)):
        texts = {tuple(text_of(rollout, i)) for i in range(4 * group, 4 * group + 4)}
        assert len(texts) > 1
    assert len({tuple(text_of(rollout, i)) for i in range(len(rollout))}) > 15


def test_rollout_is_what_its_names_draw(collect, left_padded):
    """Response j to prompt i of the whole batch is drawn by row i·k + j, in the order of the prompts."""
    rollout, network, _ = collect()
    uniforms = row_uniforms(seed=9, stream="train", iteration=2, rows=range(15), length=LENGTH)
    batch = left_padded(PROMPTS)
    expected = decode(network, *repeated(batch, K), uniforms, **OPTIONS)
    assert torch.equal(rollout.response_mask, expected.response_mask[:, : rollout.response_mask.shape[1]])
    assert [text_of(rollout, i) for i in range(15)] == [
        row[:n] for row, n in zip(expected.tokens.tolist(), expected.response_mask.sum(1).tolist(), strict=True)
    ]


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2), (2, 3)])
def test_one_sample_draws_the_rows_it_always_drew(collect, left_padded, rank, world):
    rollout, network, _ = collect(k=1, rank=rank, world=world)
    rows = range(rank, rank + world * len(PROMPTS), world)
    uniforms = row_uniforms(seed=9, stream="train", iteration=2, rows=rows, length=LENGTH)
    batch = left_padded(PROMPTS, fill=29)
    sampled = decode(network, batch.tokens, batch.mask, uniforms, **(OPTIONS | {"pad_token": ENDS[0]}))
    width = rollout.response_mask.shape[1]
    assert torch.equal(rollout.tokens[:, rollout.prompt_width :], sampled.tokens[:, :width])
    assert torch.allclose(rollout.sampler_logprobs, sampled.logprobs[:, :width], rtol=0, atol=1e-12)
    assert rollout.prompt_index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_draw_what_one_draws(collect, k, world):
    prompts = [*PROMPTS, [30, 31]]
    whole, *_ = collect(prompts=prompts, k=k)
    expected = [text_of(whole, i) for i in range(6 * k)]
    for rank in range(world):
        part, *_ = collect(prompts=prompts[rank::world], k=k, rank=rank, world=world)
        found = [text_of(part, i) for i in range(len(part))]
        mine = [i * k + j for i in range(rank, 6, world) for j in range(k)]
        assert found == [expected[i] for i in mine]
        assert part.prompt_index.tolist() == [i for i in range(6 // world) for _ in range(k)]
    stranger, *_ = collect(prompts=prompts[1::2], k=k)  # as if it were the first
    assert [text_of(stranger, i) for i in range(k)] != expected[k : 2 * k]


def test_low_precision_sampler_draws_k_of_each(collect):
    rollout, *_ = collect("llama", dtype="bfloat16")
    assert rollout.prompt_index.tolist() == [i for i in range(5) for _ in range(K)]
    assert (rollout.sampler_logprobs - rollout.logprobs).abs().max() > 1e-4  # bfloat16 holds 8 bits
    assert rollout.logprobs.dtype == torch.float64


@pytest.mark.parametrize("wrong", [0, -1])
def test_less_than_one_sample_is_refused(wrong):
    with pytest.raises(ValueError, match="samples_per_prompt"):
        SamplingParams(samples_per_prompt=wrong)
    assert SamplingParams(samples_per_prompt=1).samples_per_prompt == 1
