"""The policy: what it says of tokens, where responses end, what it writes to disk."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.sampling_copy import make_actor

TEXTS = [[12, 13, 14, 15, 16], [10, 11, 0], [20, 21, 22, 0], [33, 30, 29, 8, 7]]
WIDTH = 2


def padded(texts, side, extra=0, fill=25):
    width = max(map(len, texts)) + extra
    tokens, mask = [], []
    for text in texts:
        gap, real = [fill] * (width - len(text)), [True] * len(text)
        tokens.append(gap + text if side == "left" else text + gap)
        mask.append([False] * len(gap) + real if side == "left" else real + [False] * len(gap))
    return torch.tensor(tokens), torch.tensor(mask)


def naive(network, text, temperature=1.0):
    """log π of tokens 1 .. L−1, by Python sums over the vocabulary."""
    with torch.no_grad():
        logits = (network(input_ids=torch.tensor([text])).logits[0] / temperature).tolist()
    logprobs = []
    for row, token in zip(logits[:-1], text[1:], strict=True):
        total = math.log(math.fsum(math.exp(x - max(row)) for x in row)) + max(row)
        logprobs.append(row[token] - total)
    return logprobs


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_naive_loop_under_both_paddings(make_lm, kind, temperature):
    """Right padding: every position. Left padding: every position that has a token before it."""
    policy = PolicyModel(make_lm(kind).double().eval())
    for side, extra in (("right", 0), ("right", 2), ("left", 0), ("left", 3)):
        tokens, mask = padded(TEXTS, side, extra)
        width = tokens.shape[1] - 1
        found = policy(tokens, mask, width=width, temperature=temperature)
        assert found.shape == (4, width)
        assert found.dtype == torch.float64
        for i, text in enumerate(TEXTS):
            first = 0 if side == "right" else tokens.shape[1] - len(text)
            place = slice(first, first + len(text) - 1)
            assert found[i, place].tolist() == pytest.approx(naive(policy.network, text, temperature), abs=1e-10)
        real = mask[:, 1:]
        assert not found[~real].any()


def test_padding_is_seen_without_the_mask(make_lm):
    """Negative control of the test above."""
    policy = PolicyModel(make_lm().double().eval())
    tokens, mask = padded(TEXTS, "left", 3)
    real, unmasked = (policy(tokens, m, width=WIDTH) for m in (mask, torch.ones_like(mask)))
    assert float((real - unmasked).abs().max()) > 0.1


@pytest.mark.parametrize("width", [1, 2, 4])
def test_width_takes_the_last_tokens(make_lm, width):
    policy = PolicyModel(make_lm().double().eval())
    tokens, mask = padded(TEXTS, "left")
    whole = policy(tokens, mask, width=4)
    assert torch.allclose(policy(tokens, mask, width=width), whole[:, -width:], rtol=0, atol=1e-12)


def test_logits_are_made_for_the_kept_positions_only(make_lm):
    policy = PolicyModel(make_lm().eval())
    shapes = []
    policy.network.lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    policy(*padded(TEXTS, "left"), width=WIDTH)
    assert shapes == [(4, WIDTH + 1, 36)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprobs_are_float32_in_low_precision(make_lm, dtype):
    policy = PolicyModel(make_lm("llama").to(dtype).eval())
    assert policy(*padded(TEXTS, "left"), width=WIDTH).dtype == torch.float32


# End tokens


def test_end_tokens_are_those_of_template_tokenizer_and_generation_config(make_lm, toy_tokenizer):
    """The template ends a turn with 4; of the network's configs the generation config goes first."""
    network = make_lm(end=7)
    policy = PolicyModel(network, toy_tokenizer)
    network.generation_config.eos_token_id = [9, 8]
    assert policy.end_tokens == [4, 0, 9, 8]
    network.generation_config.eos_token_id = 5
    assert policy.end_tokens == [4, 0, 5]
    network.generation_config.eos_token_id = 0  # an id, though falsy
    assert policy.end_tokens == [4, 0]
    network.generation_config = GenerationConfig()
    assert policy.end_tokens == [4, 0, 7]
    toy_tokenizer.eos_token = "<|im_end|>"
    assert policy.end_tokens == [4, 7]
    network.config.eos_token_id = None
    assert policy.end_tokens == [4]
    toy_tokenizer.eos_token = toy_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="set `eos_token_id`"):
        _ = policy.end_tokens
    with pytest.raises(ValueError, match="names an end token"):
        _ = PolicyModel(network).end_tokens


def test_an_empty_list_of_end_tokens_names_none(make_lm):
    network = make_lm(end=7)
    network.generation_config.eos_token_id = []
    assert PolicyModel(network).end_tokens == [7]


@pytest.mark.parametrize(
    ("end", "named", "written"),
    [
        ("<|im_end|>", 4, 4),
        ("<|im_end|>", [4], [4]),
        ("<|im_end|>", 0, [4, 0]),
        ("</s>", 0, [4, 0]),
        ("</s>", 7, [4, 0, 7]),
    ],
)
def test_exported_generation_config_names_every_end(make_lm, toy_tokenizer, tmp_path, end, named, written):
    """With what else it said; where all agree, as it was."""
    network = make_lm()
    network.generation_config.update(eos_token_id=named, do_sample=True, top_k=7)
    toy_tokenizer.eos_token = end
    PolicyModel(network, toy_tokenizer).save_pretrained(tmp_path / "policy")
    found = json.loads((tmp_path / "policy" / "generation_config.json").read_text("utf-8"))
    network.generation_config.save_pretrained(tmp_path)
    assert found == json.loads((tmp_path / "generation_config.json").read_text("utf-8")) | {"eos_token_id": written}
    assert network.generation_config.eos_token_id == named
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == end


def test_network_without_an_end_is_exported_without_one(make_lm, tmp_path):
    network = make_lm()
    network.generation_config.eos_token_id = network.config.eos_token_id = None
    PolicyModel(network).save_pretrained(tmp_path / "policy")
    assert "eos_token_id" not in json.loads((tmp_path / "policy" / "generation_config.json").read_text("utf-8"))


# Copies and adapters


def test_frozen_copy_stays_as_it_was(make_lm, toy_tokenizer):
    policy = PolicyModel(make_lm(), toy_tokenizer).train()
    clone = policy.frozen_copy()
    batch = padded(TEXTS, "left")
    before = clone(*batch, width=WIDTH)
    assert not clone.training
    assert not any(p.requires_grad for p in clone.parameters())
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    assert torch.equal(clone(*batch, width=WIDTH), before)
    assert not torch.allclose(policy.eval()(*batch, width=WIDTH), before, atol=1e-2)


def test_reference_of_an_adapted_policy_is_its_base(adapted):
    policy = PolicyModel(adapted().eval())
    batch = padded(TEXTS, "left")
    with policy.reference():
        inside = policy(*batch, width=WIDTH)
    bare = copy.deepcopy(policy.network).unload()
    assert torch.equal(inside, PolicyModel(bare)(*batch, width=WIDTH))
    assert float((policy(*batch, width=WIDTH) - inside).abs().max()) > 0.1


def test_reference_of_a_bare_policy_is_itself(make_lm):
    policy = PolicyModel(make_lm().eval())
    batch = padded(TEXTS, "left")
    outside = policy(*batch, width=WIDTH)
    with policy.reference():
        assert torch.equal(policy(*batch, width=WIDTH), outside)


def test_reference_is_refused_where_the_adapter_off_is_no_start(adapted):
    """Biases under the adapter are trained, or PEFT moved the weights under it when it was put on."""
    for bias in ("all", "lora_only"):
        policy = PolicyModel(adapted(bias=bias))
        with pytest.raises(ValueError, match=r"act there too, such as .*bias: set `bias: none` in `peft`"):
            policy.reference().__enter__()
    with pytest.raises(ValueError, match=r"changed the weights under it, such as .*c_attn.weight"):
        PolicyModel(adapted(init_lora_weights="pissa")).reference().__enter__()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_rslora": True}])
def test_reference_of_other_adapters_is_the_start(adapted, make_lm, options):
    policy = PolicyModel(adapted(**options).eval())
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1 * weight.requires_grad)
    tokens = torch.tensor(TEXTS[:1])
    start = make_lm().eval()(input_ids=tokens).logits
    with policy.reference():
        assert torch.allclose(policy.network(input_ids=tokens).logits, start, atol=1e-5)
    assert not torch.allclose(policy.network(input_ids=tokens).logits, start, atol=1e-2)


@pytest.mark.parametrize("target", [["c_attn", "lm_head"], ["wte"], ["wte", "lm_head"]])
def test_adapter_on_tied_weights_is_folded_into_its_own_layer(adapted, toy_tokenizer, tmp_path, target):
    """The embedding and the head share a weight under the adapter; the change is one of them's."""
    policy = PolicyModel(adapted(target_modules=target).eval(), toy_tokenizer)
    assert policy.network.config.tie_word_embeddings
    tokens = torch.tensor(TEXTS[:1])
    expected = policy.network(input_ids=tokens).logits
    policy.save_pretrained(tmp_path / "merged", merge_adapter=True)
    policy.save_pretrained(tmp_path / "adapter")
    networks = {
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "next stage": ModelSource(path=str(tmp_path / "adapter")).causal_lm(),
        "sampler": make_actor(policy.network, torch.float32, passes=1),
    }
    for name, network in networks.items():
        assert torch.allclose(network.eval()(input_ids=tokens).logits, expected, atol=1e-4), name
    assert torch.equal(policy.network(input_ids=tokens).logits, expected)


def test_merging_what_changes_no_weight_is_refused(make_lm, tmp_path):
    peft = pytest.importorskip("peft")
    network = peft.get_peft_model(make_lm(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="the adapter is no change of weights: leave it out"):
        PolicyModel(network).save_pretrained(tmp_path / "policy", merge_adapter=True)


# Folders


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_saved_folder_loads_in_transformers(make_lm, toy_tokenizer, tmp_path, kind):
    network = make_lm(kind).eval()
    network.generation_config.eos_token_id = [0, 4]
    PolicyModel(network, toy_tokenizer).save_pretrained(tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokens = torch.tensor(TEXTS[:1])
    assert torch.equal(loaded(input_ids=tokens).logits, network(input_ids=tokens).logits)
    assert loaded.generation_config.eos_token_id == [0, 4]
    assert tokenizer.get_vocab() == toy_tokenizer.get_vocab()
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer.chat_template == toy_tokenizer.chat_template
    dialogue = [{"role": "user", "content": "a b"}]
    text = tokenizer.apply_chat_template(dialogue, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == [3, 5, 10, 11, 4, 3, 6]
    source = ModelSource(path=str(tmp_path / "policy"))
    again = PolicyModel(source.causal_lm(), source.tokenizer())
    assert again.end_tokens == [4, 0]
    batch = padded(TEXTS, "left")
    ours = PolicyModel(network)(*batch, width=WIDTH)
    assert torch.equal(again(*batch, width=WIDTH), ours)
    assert list(tmp_path.iterdir()) == [tmp_path / "policy"]


def test_merged_folder_equals_the_adapted_policy(adapted, toy_tokenizer, tmp_path):
    policy = PolicyModel(adapted().eval(), toy_tokenizer)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    policy.save_pretrained(tmp_path / "merged", merge_adapter=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        found, expected = merged(input_ids=tokens).logits, policy.network(input_ids=tokens).logits
        with policy.network.disable_adapter():
            base = policy.network(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-4)  # W + BA against Wx + B(Ax), float32
    assert float((found - base).abs().max()) > 0.1
    assert {name for name, _ in policy.named_parameters()} == before.keys()  # the policy trains on in its adapter
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == toy_tokenizer.chat_template


def test_adapter_folder_is_small_and_loads_in_transformers(adapted, toy_tokenizer, tmp_path):
    policy = PolicyModel(adapted().eval(), toy_tokenizer)
    policy.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    tokens = torch.tensor(TEXTS[:1])
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=tokens).logits, policy.network(input_ids=tokens).logits, atol=1e-5)


def test_adapter_folder_can_be_trained_further(adapted, toy_tokenizer, tmp_path):
    PolicyModel(adapted().eval(), toy_tokenizer).save_pretrained(tmp_path / "adapter")
    network = ModelSource(path=str(tmp_path / "adapter")).causal_lm()
    assert any(p.requires_grad for p in network.parameters())


def test_merging_without_an_adapter_is_refused(make_lm, tmp_path):
    with pytest.raises(ValueError, match="`merge_adapter` was asked for, but the model has no adapter"):
        PolicyModel(make_lm()).save_pretrained(tmp_path / "policy", merge_adapter=True)
    assert list(tmp_path.iterdir()) == []


def test_saving_replaces_an_older_folder(make_lm, tmp_path):
    folder = tmp_path / "policy"
    PolicyModel(make_lm(seed=1)).save_pretrained(folder)
    PolicyModel(make_lm(seed=2)).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, make_lm(seed=2).lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, make_lm(seed=1).lm_head.weight)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_folder_can_be_in_another_precision_than_the_policy(make_lm, tmp_path, dtype):
    """The head stays tied to the embeddings."""
    model = PolicyModel(make_lm("llama", tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "cast", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cast")
    assert loaded.dtype is getattr(torch, dtype)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(loaded.dtype))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("own", "cast")]
    assert sizes[1] < (0.65 if dtype == "bfloat16" else 1.01) * sizes[0]
    assert next(model.network.parameters()).dtype is torch.float32
