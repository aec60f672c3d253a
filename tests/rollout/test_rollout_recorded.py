"""A recorded pass over fixed buffers gives what passes over a growing cache give; on a CPU a recording is the pass."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from lightning_rlhf.engines import cuda_graph as recorded
from lightning_rlhf.engines import decode, slots
from lightning_rlhf.engines.slots import Slots

PROMPTS = [[12, 13, 14, 15], [10], [20, 21, 22, 23, 24, 25, 26], [33, 11], [7, 8, 9], [30], [18, 19, 28], [35, 35]]
LENGTH = 40
OPTIONS = {"length": LENGTH, "temperature": 0.8, "end_tokens": [3, 7], "pad_token": 3}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["gpt2", "llama"])
def network(request, make_lm):
    return make_lm(request.param).double().eval()


@pytest.fixture
def batch(left_padded):
    return left_padded(PROMPTS, fill=29)


@pytest.fixture
def made(monkeypatch):
    """(rows, columns) of every pass that was recorded, as if this were a GPU; a recording is the pass itself."""
    found = []

    def record(step):
        found.append(tuple(step.__self__._mask.shape))
        return step

    monkeypatch.setattr(recorded, "record", record)
    monkeypatch.setattr(slots, "recordable", lambda network: type(network).__qualname__ not in recorded._UNRECORDABLE)
    monkeypatch.setattr(recorded, "_UNRECORDABLE", set())
    return found


def numbers(samples=1):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(len(PROMPTS) * samples, LENGTH, generator=generator, dtype=torch.float64)


def drawn(network, batch, samples=1, **options):
    return decode(network, batch.tokens, batch.mask, numbers(samples), samples=samples, **(OPTIONS | options))


def assert_same(one, two, atol=1e-6):
    """RMSNorm is float32."""
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.ended, two.ended)
    assert torch.allclose(one.logprobs, two.logprobs, rtol=0, atol=atol)
    assert torch.allclose(one.entropy, two.entropy, rtol=0, atol=atol)


@pytest.mark.parametrize(("samples", "ends"), [(1, [3, 7]), (3, [3, 7, 11, 16])])
def test_fixed_buffers_change_no_response(network, batch, made, monkeypatch, samples, ends):
    """Rows leave at half their number, and a new recording begins where the columns of one are full."""
    monkeypatch.setattr(recorded, "AHEAD", 10)
    with_buffers = drawn(network, batch, samples, end_tokens=ends)
    rows, columns = zip(*made, strict=True)
    assert rows[0] == 8 * samples
    assert rows[-1] < rows[0]
    assert len(set(columns)) >= 2
    assert all(count % 8 == 0 for count in columns)
    monkeypatch.setattr(slots, "recordable", lambda network: False)
    assert_same(with_buffers, drawn(network, batch, samples, end_tokens=ends))
    lengths = with_buffers.response_mask.sum(1)
    assert len(set(lengths.tolist())) >= 4
    assert int(lengths.max()) > 10


def test_nothing_is_recorded_while_prompts_wait(network, batch, made, monkeypatch):
    refilled = drawn(network, batch, slots=3)
    assert made
    assert all(rows <= 3 for rows, _ in made)
    assert len(made) <= 3  # for the last prompts alone: 3 rows, then 1
    monkeypatch.setattr(slots, "recordable", lambda network: False)
    assert_same(refilled, drawn(network, batch))


def test_few_passes_are_not_recorded(network, batch, made):
    drawn(network, batch, length=recorded.WORTH_RECORDING)
    assert made == []
    drawn(network, batch, length=recorded.WORTH_RECORDING + 1)
    assert len(made) == 1


def falsified(step):
    """What writes over the keys it was to write, and gives other logits."""

    def replay():
        logits = step()
        for layer in step.__self__._cache.layers:
            layer.keys[:, :, step.__self__._column - 1] = 9.0
        return -logits

    return replay


def refused(step):
    raise RuntimeError("operation not permitted when stream is capturing\nand a second line")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (falsified, "a recorded pass gives other logits"),
        (refused, "operation not permitted when stream is capturing"),
    ],
)
def test_network_that_fails_goes_on_as_it_is(network, batch, made, monkeypatch, caplog, record, reason):
    """Once; and nobody records it again."""
    monkeypatch.setattr(recorded, "record", record)
    with caplog.at_level(logging.INFO, "lightning_rlhf.engines.cuda_graph"):
        found = drawn(network, batch)
    (message,) = caplog.messages
    assert message.endswith(f"which would be faster: {reason}")
    assert type(network).__qualname__ in message
    monkeypatch.setattr(slots, "recordable", lambda network: False)
    assert_same(found, drawn(network, batch))


def test_recorded_rows_can_be_joined_by_others(network, left_padded, made):
    """Which `decode` does not do: buffers are cut to what is used, and logits do not lie in them any more."""
    batch, zeros = left_padded(PROMPTS), torch.zeros(8, dtype=torch.long)

    def joined(passes):
        live = Slots(network)
        live.admit(torch.arange(4), batch.tokens[:4], batch.mask[:4], samples=1)
        for token in (11, 12):
            live.advance(zeros[:4] + token, passes=passes)
        live.admit(torch.arange(4, 8), batch.tokens[4:], batch.mask[4:], samples=1)
        before = live.logits
        live.advance(zeros + 13)
        return before, live.logits

    with torch.no_grad():
        (one, two), (three, four) = joined(0), joined(20)
    assert len(made) == 1
    assert torch.allclose(one, three, rtol=0, atol=1e-6)
    assert torch.allclose(two, four, rtol=0, atol=1e-6)


def test_only_what_sees_all_columns_is_recorded_on_a_gpu_alone():
    sizes = {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    whole, window = (MistralForCausalLM(MistralConfig(**sizes, sliding_window=size)) for size in (None, 4))
    assert not recorded.recordable(whole)
    assert (recorded.slides(whole), recorded.slides(window)) == (False, True)


@needs_gpu
@pytest.mark.parametrize("samples", [1, 3])
def test_gpu_replays_and_changes_no_response(network, batch, monkeypatch, samples):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    on_cpu = drawn(network, batch, samples)
    on_gpu = drawn(network.cuda(), batch._replace(tokens=batch.tokens.cuda(), mask=batch.mask.cuda()), samples)
    assert len(replays) > 15
    assert_same(on_cpu, type(on_gpu)(*(x.cpu() for x in on_gpu)), atol=1e-5)
