"""Passes without padding: the same numbers and gradients, fewer tokens, and no network that mixes sequences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models import packing as packed_module
from lightning_rlhf.models.microbatching import pieces_of
from lightning_rlhf.models.packing import Packing
from lightning_rlhf.types import Rollout

PROMPTS, RESPONSES = [3, 5, 1], [[7, 2], [1, 4, 0], [3]]
SIZES = {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def rollout_of(prompts: list[int], responses: list[list[int]]) -> Rollout:
    """Random tokens of given lengths; rows of a prompt are consecutive."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([g for g, rs in enumerate(responses) for _ in rs])
    lengths = torch.tensor([r for rs in responses for r in rs])
    before, after = max(prompts), max(1, int(lengths.max()))
    tokens = torch.randint(3, 36, (len(group), before + after), generator=generator)
    tokens[:, :before] = tokens[[int((group == g).nonzero()[0]) for g in group], :before]
    columns = torch.arange(before + after)
    real = (columns >= before - torch.tensor(prompts)[group][:, None]) & (columns < before + lengths[:, None])
    nothing = torch.zeros(len(group), after)
    return Rollout(
        tokens=tokens,
        attention_mask=real,
        response_mask=real[:, before:],
        ended=torch.ones(len(group), dtype=torch.bool),
        prompt_index=group,
        sampler_logprobs=nothing,
        entropy=nothing,
        logprobs=nothing,
        ref_logprobs=nothing,
        values=nothing,
    )


def pair(network: nn.Module) -> tuple[PolicyModel, PolicyModel]:
    padded, packed = PolicyModel(network), PolicyModel(copy.deepcopy(network))
    packed.backbone.pack()
    return padded, packed


def gradients(policy: PolicyModel, logprobs: torch.Tensor) -> list[torch.Tensor]:
    weight = torch.linspace(0.5, 2, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)
    return list(torch.autograd.grad((logprobs * weight).sum(), list(policy.parameters())))


def logprobs_of(policy: PolicyModel, rollout: Rollout, *, shared: bool) -> torch.Tensor:
    if shared:
        return policy.response_logprobs(rollout, temperature=0.7)
    width = rollout.response_mask.shape[1]
    return policy(rollout.tokens, rollout.attention_mask, width=width, temperature=0.7, wanted=rollout.response_mask)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_and_gradients_are_those_of_padded_rows(make_lm, attention, recomputed, shared):
    network = make_lm("gpt2", attn_implementation=attention, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0).double()
    if recomputed:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    padded, packed = pair(network.train(recomputed))
    rollout = rollout_of(PROMPTS, RESPONSES)
    one, other = (logprobs_of(policy, rollout, shared=shared) for policy in (padded, packed))
    assert float(one.abs().max()) > 1
    assert torch.allclose(one, other, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients(padded, one), gradients(packed, other), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.float64), ("eager", torch.float32)])
def test_key_value_heads_may_be_fewer(make_lm, attention, dtype):
    """Rotary positions start anew with each sequence; RMSNorm rounds to float32 whatever comes."""
    padded, packed = pair(make_lm("llama", attn_implementation=attention).to(dtype).eval())
    rollout = rollout_of(PROMPTS, RESPONSES)
    one, other = (policy.response_logprobs(rollout, temperature=1.0) for policy in (padded, packed))
    assert torch.allclose(one, other, rtol=0, atol=1e-11 if dtype == torch.float64 else 1e-5)
    for mine, theirs in zip(gradients(padded, one), gradients(packed, other), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5 * float(mine.abs().max()))


def test_padded_passes_of_a_packing_network_are_as_before(make_lm):
    """Sampling, evaluation and export go on with the network whose attention was exchanged."""
    network = make_lm("llama").double().eval()
    tokens, mask = torch.tensor([[5, 6, 7], [0, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    before = network(input_ids=tokens, attention_mask=mask).logits
    PolicyModel(network).backbone.pack()
    assert torch.equal(network(input_ids=tokens, attention_mask=mask).logits, before)
    assert "packed" not in network.config.to_json_string()


def test_no_token_of_another_sequence_counts(make_lm):
    """The gradient of one response with respect to the states of all other sequences is exactly 0."""
    _, policy = pair(make_lm("gpt2").double().eval())
    rollout, seen = rollout_of(PROMPTS, RESPONSES), []
    policy.response_logprobs(rollout, temperature=1.0)  # the first call looks at the head and at the packing

    def keep(_: nn.Module, __: object, states: torch.Tensor) -> None:
        states.retain_grad()
        seen.append(states)

    policy.network.transformer.wte.register_forward_hook(keep)
    policy.response_logprobs(rollout, temperature=1.0)[0].sum().backward()
    (states,) = seen
    touched = states.grad[0].abs().sum(1) > 0
    # prompts of 3, 5 and 1 tokens, then responses of 6, 2, 1, 4, 0 and 3: the last column is never read
    assert touched.nonzero().flatten().tolist() == [0, 1, 2, 9, 10, 11, 12, 13, 14]


def test_a_response_of_one_token_needs_the_prompt_alone(make_lm):
    padded, packed = pair(make_lm("gpt2").double().eval())
    rollout = rollout_of([3, 2], [[1, 1], [1, 0]])
    for shared in (True, False):
        one, other = (logprobs_of(policy, rollout, shared=shared) for policy in (padded, packed))
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_values_are_those_of_padded_rows(make_scorer):
    value = ScalarModel(make_scorer("llama").double().eval())
    rollout = rollout_of(PROMPTS, RESPONSES)
    before = value.response_values(rollout)
    value.backbone.pack()
    mask = rollout.response_mask
    assert torch.allclose(value.response_values(rollout)[mask], before[mask], rtol=0, atol=1e-11)


def test_network_whose_attention_mixes_sequences_is_refused(make_lm, monkeypatch):
    _, policy = pair(make_lm("gpt2").double().eval())

    def mix(self, kernel, query, key, value):
        everything = torch.ones(1, 1, query.shape[2], query.shape[2], dtype=torch.bool)
        return kernel(query, key, value, everything.tril())[0]

    monkeypatch.setattr(Packing, "attend", mix)
    with pytest.raises(ValueError, match="`updates.packing`.*GPT2LMHeadModel: one sequence changes another's states"):
        policy.response_logprobs(rollout_of(PROMPTS, RESPONSES), temperature=1.0)


def test_network_that_ignores_positions_is_refused(make_lm):
    _, policy = pair(make_lm("gpt2").double().eval())
    policy.backbone.module.register_forward_pre_hook(
        lambda _, args, named: (args, named | {"position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="its packed states are not those of padded rows"):
        policy.response_logprobs(rollout_of(PROMPTS, RESPONSES), temperature=1.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)), "sliding window; set it to false"),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=36, hidden_size=16, n_layer=1, n_head=2)), "`position_ids`"),
    ],
)
def test_network_of_which_it_is_not_certain_is_refused(make, said):
    with pytest.raises(ValueError, match=f"`updates.packing` cannot be used with .*{said}"):
        PolicyModel(make()).backbone.pack()


def test_other_kernel_is_refused(make_lm, monkeypatch):
    network = make_lm("llama")
    monkeypatch.setattr(network.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="its attention is flash_attention_2, and only sdpa and eager"):
        PolicyModel(network).backbone.pack()


def test_microbatches_are_filled_with_real_tokens():
    rollout = rollout_of([4, 2], [[9, 1, 1], [2, 2]])
    pieces = pieces_of(rollout, rows=None, tokens=15, packed=True)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2], [3, 4]]  # 4 + 9 + 1 + 1 tokens, then 2 + 2 + 2
    assert [piece.tolist() for piece in pieces_of(rollout, rows=None, tokens=14, packed=True)] == [[0, 1], [2, 3, 4]]
    assert [len(piece) for piece in pieces_of(rollout, rows=None, tokens=15)] == [1, 2, 2]
    assert [len(piece) for piece in pieces_of(rollout, rows=2, tokens=15, packed=True)] == [2, 2, 1]
    assert [len(piece) for piece in pieces_of(rollout, rows=None, tokens=1, packed=True)] == [1] * 5


def computed(policy: PolicyModel, rollout: Rollout, pieces: list[torch.Tensor]) -> int:
    """Tokens that go through the network's first linear map."""
    seen: list[int] = []
    hook = policy.network.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda _, __, states: seen.append(states.shape[:-1].numel())
    )
    with torch.no_grad():
        for piece in pieces:
            policy.response_logprobs(rollout.select(piece), temperature=1.0)
    hook.remove()
    return sum(seen)


def test_geometric_lengths_cost_a_third_less(make_lm):
    """64 responses to 16 prompts, of 32 tokens in the mean, in microbatches of 1,024 tokens sorted by length."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(64).geometric_(1 / 32, generator=generator).clamp(max=128).int().view(16, 4).tolist()
    rollout = rollout_of(torch.randint(4, 17, (16,), generator=generator).tolist(), drawn)
    padded, packed = pair(make_lm("llama").eval())
    with torch.no_grad():
        packed.response_logprobs(rollout.select(torch.tensor([0])), temperature=1.0)  # the first call looks
    counts = [
        computed(policy, rollout, pieces_of(rollout, rows=None, tokens=1024, packed=policy is packed))
        for policy in (padded, packed)
    ]
    responses = int(rollout.response_mask.sum())
    assert responses <= counts[1] <= responses + 16 * 16 * 2  # a prompt is read again where its responses are cut apart
    assert counts[0] / counts[1] > 1.3, counts
    assert packed_module.NAMES["sdpa"] == packed.network.config._attn_implementation
