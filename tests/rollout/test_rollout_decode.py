"""The decode loop against Hugging Face, a loop without cache or padding, and itself in other company."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.engines import decode

PROMPTS = [[12, 13, 14, 15], [10], [20, 21, 22, 23, 24, 25, 26], [33, 11], [7, 8, 9], [30], [18, 19, 28], [35, 35]]
LENGTH = 12


@pytest.fixture(params=["gpt2", "llama"])
def network(request, make_lm):
    return make_lm(request.param).double().eval()


def generate(network, batch, ends, length=LENGTH):
    """Hugging Face's greedy continuation, (B, length), filled with the first end token."""
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": ends[0]}
    full = network.generate(batch.tokens, attention_mask=batch.mask.long(), eos_token_id=ends, **options)
    new = full[:, batch.tokens.shape[1] :]
    return torch.nn.functional.pad(new, (0, length - new.shape[1]), value=ends[0])


def ends_of(network, batch, count):
    """End tokens that the greedy responses reach at different times."""
    network.generation_config.eos_token_id = None
    free = generate(network, batch, [35])  # an id that fills; nothing ends
    best = max(range(36), key=lambda v: len({row.index(v) for row in free.tolist() if v in row}))
    other = [v for v in free[0, 2:].tolist() if v != best][: count - 1]
    return [best, *other]


def lengths_by_hand(rows, ends):
    return [next((t + 1 for t, token in enumerate(row) if token in ends), len(row)) for row in rows.tolist()]


@pytest.mark.parametrize("count", [1, 2])
def test_greedy_equals_hugging_face(network, left_padded, count):
    batch = left_padded(PROMPTS, fill=29)
    ends = ends_of(network, batch, count)
    expected = generate(network, batch, ends)
    sampled = decode(
        network, batch.tokens, batch.mask, None, length=LENGTH, temperature=1.0, end_tokens=ends, pad_token=ends[0]
    )
    assert torch.equal(sampled.tokens, expected)
    lengths = lengths_by_hand(expected, ends)
    assert len(set(lengths)) >= 3  # ended at different times, or this means little
    assert sampled.response_mask.sum(1).tolist() == lengths
    steps = torch.arange(LENGTH)
    assert torch.equal(sampled.response_mask, steps < torch.tensor(lengths).unsqueeze(1))
    last = expected[torch.arange(len(PROMPTS)), torch.tensor(lengths) - 1]
    assert sampled.ended.tolist() == [token in ends for token in last.tolist()]
    other = decode(network, batch.tokens, batch.mask, None, length=LENGTH, temperature=1.0, end_tokens=[6], pad_token=6)
    assert not torch.equal(other.tokens, expected)


def test_mask_matters(network, left_padded):
    """The negative control of left padding: without the mask the padding is read."""
    batch = left_padded(PROMPTS, fill=29)
    options = {"length": LENGTH, "temperature": 1.0, "end_tokens": [99], "pad_token": 0}
    masked = decode(network, batch.tokens, batch.mask, None, **options)
    unmasked = decode(network, batch.tokens, torch.ones_like(batch.mask), None, **options)
    assert not torch.equal(masked.tokens, unmasked.tokens)


def naive_response(network, prompt, uniforms, *, temperature, ends):
    """One row, no cache, no padding, a plain running sum over the vocabulary."""
    tokens, logprobs = list(prompt), []
    for u in uniforms.tolist():
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([tokens])).logits[0, -1].double()
        probabilities = (logits / temperature).softmax(-1).tolist()
        total, token = 0.0, None
        for v, p in enumerate(probabilities):
            total += p
            if token is None and total > u:
                token = v
        tokens.append(token)
        logprobs.append(float((logits / temperature).log_softmax(-1)[token]))
        if token in ends:
            break
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_equals_a_loop_without_cache(network, left_padded, temperature):
    batch = left_padded(PROMPTS)
    uniforms = torch.rand(len(PROMPTS), LENGTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ends = [3, 7, 11, 16, 21, 30]
    sampled = decode(
        network,
        batch.tokens,
        batch.mask,
        uniforms,
        length=LENGTH,
        temperature=temperature,
        end_tokens=ends,
        pad_token=3,
    )
    lengths = set()
    for i, prompt in enumerate(PROMPTS):
        tokens, logprobs = naive_response(network, prompt, uniforms[i], temperature=temperature, ends=ends)
        n = len(tokens)
        lengths.add(n)
        assert sampled.tokens[i].tolist() == tokens + [3] * (LENGTH - n)
        assert sampled.response_mask[i].tolist() == [True] * n + [False] * (LENGTH - n)
        assert sampled.logprobs[i, :n].tolist() == pytest.approx(logprobs, abs=1e-10)
        assert sampled.logprobs[i, n:].tolist() == [0.0] * (LENGTH - n)
        assert bool(sampled.ended[i]) == (tokens[-1] in ends)
    assert len(lengths) >= 3
    assert not sampled.logprobs.requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_captured_logprobs_equal_a_forward_pass(make_lm, left_padded, kind, dtype, tolerance):
    """At τ = 0.7; the tolerance is the rounding between a cached and a whole pass."""
    network = make_lm(kind).to(dtype).eval()
    batch = left_padded(PROMPTS)
    uniforms = torch.rand(len(PROMPTS), LENGTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    sampled = decode(
        network, batch.tokens, batch.mask, uniforms, length=LENGTH, temperature=0.7, end_tokens=[3, 7], pad_token=0
    )
    assert sampled.logprobs.dtype == dtype
    assert 0 < int(sampled.response_mask.sum()) < sampled.response_mask.numel()
    apart = {0.7: 0.0, 1.0: 0.0}
    for i, prompt in enumerate(PROMPTS):
        n = int(sampled.response_mask[i].sum())
        row = torch.tensor([prompt + sampled.tokens[i, :n].tolist()])
        with torch.no_grad():
            logits = network(input_ids=row).logits[0, -n - 1 : -1]
        for temperature in apart:
            logprobs = (logits / temperature).log_softmax(-1).gather(1, row[0, -n:, None]).squeeze(1)
            gap = float((logprobs - sampled.logprobs[i, :n]).abs().max())
            apart[temperature] = max(apart[temperature], gap)
    assert apart[0.7] < tolerance
    assert apart[1.0] > 0.1


def test_company_changes_nothing(network, left_padded):
    """A row alone, in the batch, and in a batch with more padding, by the same uniforms."""
    uniforms = torch.rand(len(PROMPTS), LENGTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    options = {"length": LENGTH, "temperature": 0.8, "end_tokens": [3, 7, 11, 16, 21, 30], "pad_token": 3}

    def run(batch, u):
        return decode(network, batch.tokens, batch.mask, u, **options)

    together = run(left_padded(PROMPTS), uniforms)
    wider = run(left_padded(PROMPTS, extra=4, fill=31), uniforms)
    backwards = run(left_padded(PROMPTS[::-1]), uniforms.flip(0))
    assert torch.equal(wider.tokens, together.tokens)
    assert torch.equal(backwards.tokens.flip(0), together.tokens)
    for i, prompt in enumerate(PROMPTS):
        alone = run(left_padded([prompt]), uniforms[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.ended[0], together.ended[i])
        assert torch.allclose(alone.logprobs[0], together.logprobs[i], rtol=0, atol=1e-10)
    assert not torch.equal(
        run(left_padded(PROMPTS), uniforms.flip(0)).tokens, together.tokens
    )  # rows own their numbers


def test_ended_rows_leave_the_batch(network, left_padded):
    """Rows per pass: a batch shrinks to its open rows as soon as a quarter of it has ended."""
    batch = left_padded(PROMPTS)
    uniforms = torch.rand(len(PROMPTS), LENGTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    passes = []
    hook = network.register_forward_pre_hook(
        lambda _, __, inputs: passes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    options = {"length": LENGTH, "temperature": 1.0, "pad_token": 3}
    ends = [3, 7, 11, 16, 21, 30]
    sampled = decode(network, batch.tokens, batch.mask, uniforms, end_tokens=ends, **options)
    lengths = sampled.response_mask.sum(1).tolist()
    size, expected = len(PROMPTS), [(len(PROMPTS), batch.tokens.shape[1])]
    for t in range(1, max(lengths)):
        still = sum(n > t for n in lengths)
        size = still if still <= 0.75 * size else size
        expected.append((size, 1))
    assert passes == expected
    assert len({rows for rows, _ in passes}) >= 3  # it shrank more than once
    passes.clear()
    decode(network, batch.tokens, batch.mask, uniforms, end_tokens=[99], **options)
    assert [rows for rows, _ in passes] == [len(PROMPTS)] * LENGTH
    hook.remove()


def test_all_ended_stops_early(network, left_padded):
    batch = left_padded(PROMPTS)
    passes = []
    hook = network.register_forward_pre_hook(lambda *_: passes.append(1))
    sampled = decode(
        network, batch.tokens, batch.mask, None, length=LENGTH, temperature=1.0, end_tokens=list(range(36)), pad_token=0
    )
    hook.remove()
    assert len(passes) == 1
    assert sampled.response_mask.sum(1).tolist() == [1] * len(PROMPTS)
    assert sampled.ended.all()


def test_adapted_network_decodes_as_its_merged_one(make_lm, left_padded):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    torch.manual_seed(1)
    network = peft.get_peft_model(make_lm().double().eval(), config)
    batch = left_padded(PROMPTS)
    options = {"length": LENGTH, "temperature": 1.0, "end_tokens": [3, 7], "pad_token": 3}
    adapted = decode(network, batch.tokens, batch.mask, None, **options)
    with network.disable_adapter():
        bare = decode(network, batch.tokens, batch.mask, None, **options)
    merged = decode(network.merge_and_unload(), batch.tokens, batch.mask, None, **options)
    assert torch.equal(adapted.tokens, merged.tokens)
    assert not torch.equal(adapted.tokens, bare.tokens)
