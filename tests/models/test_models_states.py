"""Prompts read once for several responses, and the head on wanted positions alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_rlhf.models import PolicyModel

PROMPTS = [[12, 13, 14], [10], [20, 21, 22, 23, 24]]
RESPONSES = [[[5, 6, 7, 8], [9]], [[11, 12]], [[30, 31, 32], [33, 34, 35, 29], [28, 27]]]
SIZES = {"vocab_size": 36, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.4}


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def network(request, make_lm):
    if request.param == "mistral":  # a window of 3 tokens: responses look past it into the prompt or do not
        torch.manual_seed(0)
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)).double().eval()
    return make_lm(request.param).double().eval()


@pytest.fixture
def batch():
    """Tokens, mask, groups and the responses' width; rows of one prompt are not neighbors."""
    rows = [(g, p, r) for g, (p, rs) in enumerate(zip(PROMPTS, RESPONSES, strict=True)) for r in rs]
    rows = [rows[i] for i in (0, 5, 2, 3, 1, 4)]
    before, width = max(map(len, PROMPTS)), max(len(r) for _, _, r in rows)
    tokens = [[2] * (before - len(p)) + p + r + [2] * (width - len(r)) for _, p, r in rows]
    mask = [[False] * (before - len(p)) + [True] * len(p + r) + [False] * (width - len(r)) for _, p, r in rows]
    return torch.tensor(tokens), torch.tensor(mask), torch.tensor([7 - g for g, *_ in rows]), width


def gradients(policy, logprobs):
    weight = torch.linspace(0.5, 2, logprobs.numel(), dtype=torch.float64).view(logprobs.shape)
    return torch.autograd.grad((logprobs * weight).sum(), list(policy.parameters()))


def test_shared_prompts_change_neither_logprobs_nor_gradients(network, batch):
    tokens, mask, groups, width = batch
    policy = PolicyModel(network)
    plain = policy(tokens, mask, width=width, temperature=0.7)
    shared = policy(tokens, mask, width=width, temperature=0.7, groups=groups)
    assert torch.allclose(shared, plain, rtol=0, atol=1e-11)
    tolerance = 1e-10 if network.config.model_type == "gpt2" else 1e-5  # RMSNorm computes in float32 whatever comes
    for one, other in zip(gradients(policy, shared), gradients(policy, plain), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=tolerance)


def test_groups_that_are_wrong_are_believed(network, batch):
    """Negative control: the prompt really is read from one row of the group."""
    tokens, mask, _, width = batch
    policy = PolicyModel(network)
    apart = policy(tokens, mask, width=width) - policy(tokens, mask, width=width, groups=torch.zeros(6).long())
    assert float(apart.abs().max()) > 0.1


def test_each_prompt_goes_through_the_network_once(network, batch):
    tokens, mask, groups, width = batch
    policy, passes = PolicyModel(network), []
    policy(tokens, mask, width=width)  # the first call looks at the head
    policy.backbone.module.register_forward_pre_hook(
        lambda _, __, inputs: passes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    policy(tokens, mask, width=width, groups=groups)
    assert passes == [(3, 5), (6, width - 1)]  # and the last token, which predicts nothing, not at all
    passes.clear()
    policy(tokens, mask, width=width, groups=torch.arange(6))
    assert passes == [(6, 5 + width - 1)]


def test_responses_of_one_token_need_the_prompt_alone(network, batch):
    tokens, mask, groups, width = batch
    policy, cut = PolicyModel(network), 5 + 1
    shared = policy(tokens[:, :cut], mask[:, :cut], width=1, groups=groups)
    assert torch.allclose(shared, policy(tokens[:, :cut], mask[:, :cut], width=1), rtol=0, atol=1e-11)


def test_checkpointed_training_does_not_share(make_lm, batch):
    """A checkpointed block has no cache; sharing would silently drop the prompt."""
    tokens, mask, groups, width = batch
    network = make_lm("llama").double()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModel(network.train())
    network.config.attention_dropout = 0.0
    for layer in network.model.layers:
        layer.self_attn.attention_dropout = 0.0
    trained = policy(tokens, mask, width=width, groups=groups)
    assert torch.allclose(trained, policy.eval()(tokens, mask, width=width, groups=groups), rtol=0, atol=1e-11)


def test_weights_are_cast_once_under_autocast_and_forgotten(make_lm, batch):
    """Both passes share a cast; a step later the new weights count."""
    tokens, mask, groups, width = batch
    policy = PolicyModel(make_lm("llama").eval())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        first = policy(tokens, mask, width=width, groups=groups)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1.5)
        second = policy(tokens, mask, width=width, groups=groups)
        fresh = PolicyModel(policy.network)(tokens, mask, width=width, groups=groups)
    assert torch.equal(second, fresh)
    assert float((second - first).abs().max()) > 0.1


# The head


def capped():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=64)
    return Gemma2ForCausalLM(config).eval()  # in float64 it gives NaN under left padding, by itself, too


@pytest.mark.parametrize("grouped", [True, False])
def test_capped_logits_are_those_of_the_network(batch, grouped):
    """Gemma 2 caps its logits after the head, so that the head alone would be wrong."""
    tokens, mask, groups, width = batch
    network = capped()
    policy = PolicyModel(network)
    found = policy(tokens, mask, width=width, groups=groups if grouped else None)
    for i, row in enumerate(tokens):
        real = row[mask[i]].unsqueeze(0)
        n = int(mask[i, -width:].sum())
        with torch.no_grad():
            logits = network(input_ids=real).logits[0, -n - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, real[0, -n:, None]).squeeze(1)
        assert torch.allclose(found[i, :n], expected, rtol=0, atol=1e-4)
    states = network.model(input_ids=tokens[:1]).last_hidden_state
    assert not torch.allclose(network.lm_head(states), network(input_ids=tokens[:1]).logits, atol=1e-2)


def test_head_sees_wanted_positions_alone(make_lm, batch, monkeypatch):
    from lightning_rlhf.models import policy as module

    tokens, mask, groups, width = batch
    rows = []
    inner = module.linear_logprobs
    monkeypatch.setattr(module, "linear_logprobs", lambda h, *a, **k: rows.append(len(h)) or inner(h, *a, **k))
    policy = PolicyModel(make_lm().double().eval())
    whole = policy(tokens, mask, width=width, groups=groups)
    wanted = torch.zeros(6, width, dtype=torch.bool)
    wanted[2, 1] = wanted[4, 0] = True
    some = policy(tokens, mask, width=width, wanted=wanted)
    assert rows == [int(mask[:, -width:].sum()), 2]
    assert torch.allclose(some, torch.where(wanted, whole, 0.0), rtol=0, atol=1e-11)


def test_hook_on_the_head_is_obeyed(make_lm, batch):
    """What changes the logits in sampling changes them in training."""
    tokens, mask, _, width = batch
    policy = PolicyModel(make_lm().double().eval())
    before = policy(tokens, mask, width=width)
    hook = policy.network.lm_head.register_forward_hook(lambda *args: args[2] * 2)
    hooked = policy(tokens, mask, width=width)
    hook.remove()
    assert float((hooked - before).abs().max()) > 0.1
    assert torch.equal(policy(tokens, mask, width=width), before)


GRID = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 2}


def changed(kind):
    """A language model that changes what its head gives, or whose transformer can't be told from it."""
    torch.manual_seed(3)
    if kind == "cohere":
        sizes = {name: value for name, value in GRID.items() if name != "head_dim"}
        return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.3)).eval()
    if kind == "granite":
        sizes = {name: value for name, value in GRID.items() if name != "head_dim"}
        return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0)).eval()
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**GRID, final_logit_softcapping=2.0, query_pre_attn_scalar=8)).eval()
    return Llama4ForCausalLM(Llama4TextConfig(**GRID, intermediate_size_mlp=32, num_local_experts=2)).eval()


def plain_logprobs(network, rows):
    """Of tokens 1 .. of each row alone, by transformers."""
    with torch.no_grad():
        tables = [network(input_ids=row.unsqueeze(0)).logits[0, :-1].log_softmax(-1) for row in rows]
    return [table.gather(1, row[1:, None]).squeeze(1) for table, row in zip(tables, rows, strict=True)]


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2", "llama4"])
def test_head_is_judged_by_no_row_of_the_batch(kind):
    """The embedding of padding is 0, so that the last columns of a short first row have logits 0, scaled or not."""
    network = changed(kind)
    tokens = torch.tensor([[3, 8, 9, 2, 2, 2], [3, 4, 5, 7, 9, 11]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]).bool()
    found = PolicyModel(network)(tokens, mask, width=5)
    short, long = plain_logprobs(network, [tokens[0, :3], tokens[1]])
    assert torch.allclose(found[0, :2], short, rtol=0, atol=1e-4)
    assert torch.allclose(found[1], long, rtol=0, atol=1e-4)


def test_cap_is_seen_where_the_first_logits_are_small(batch):
    """A cap leaves logits near 0 as they are to the bit; training makes them large."""
    tokens, mask, _, width = batch
    network = capped()
    head, start = network.lm_head.weight, network.lm_head.weight.detach().clone()
    policy = PolicyModel(network)
    with torch.no_grad():
        head.mul_(1e-5)
        policy(tokens, mask, width=width)
        head.copy_(start)
        found = policy(tokens, mask, width=width)
    expected = PolicyModel(capped()).logits(tokens, mask, keep=width + 1)[:, :-1].log_softmax(-1)
    expected = expected.gather(2, tokens[:, -width:, None]).squeeze(2)
    assert torch.allclose(found, torch.where(mask[:, -width:], expected, 0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3n"])
def test_gradients_are_finite_where_padding_attends_to_nothing(make_lm, batch, kind):
    """Gemma 3n divides by the size of a state, which is 0 on the left of a prompt; padding moves no gradient."""
    tokens, mask, groups, width = batch
    network = make_lm("llama") if kind == "llama" else small_gemma3n()
    policy = PolicyModel(network.double().eval())
    found = policy(tokens, mask, width=width, groups=groups)
    slopes = torch.autograd.grad(found.sum(), list(policy.parameters()), allow_unused=True)
    assert all(slope is None or slope.isfinite().all() for slope in slopes)
    alone = [policy(row[real].unsqueeze(0), real[real].unsqueeze(0), width=int(real[-width:].sum())).sum()
             for row, real in zip(tokens, mask, strict=True)]  # fmt: skip
    expected = torch.autograd.grad(sum(alone), list(policy.parameters()), allow_unused=True)
    for one, other in zip(slopes, expected, strict=True):
        assert one is other or torch.allclose(one, other, rtol=1e-3, atol=1e-4)  # its norms compute in float32


def small_gemma3n():
    torch.manual_seed(0)
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_hidden_layers", "initializer_range")}
    config = Gemma3nTextConfig(
        **sizes,
        num_hidden_layers=2,
        vocab_size_per_layer_input=36,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        pad_token_id=2,
    )
    return Gemma3nForCausalLM(config)
