"""Where networks come from, and that none of them drops out."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Starcoder2Config,
)

from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.models.meta import expect_shards, expect_whole, unread
from lightning_rlhf.models.source import without_dropout
from lightning_rlhf.modules import PPOModule

LOADERS = [ModelSource.causal_lm, partial(ModelSource.scorer, new_head=True)]


@pytest.mark.parametrize("load", LOADERS)
def test_missing_folder_is_named(tmp_path, load):
    source = ModelSource(path=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="`path`: there is no folder .*nothing"):
        load(source)


@pytest.mark.parametrize("load", LOADERS)
def test_missing_gguf_file_is_named(make_folder, load):
    source = ModelSource(path=make_folder(), gguf_file="weights.gguf")
    with pytest.raises(ValueError, match="`gguf_file`: there is no file weights.gguf in"):
        load(source)


@pytest.mark.parametrize("options", [{"path": "nothing"}, {"gguf_file": "weights.gguf"}])
def test_module_names_what_is_missing(tmp_path, make_folder, options):
    path = str(tmp_path / options["path"]) if "path" in options else make_folder()
    with pytest.raises(ValueError, match="there is no"):
        PPOModule(ModelSource(**(options | {"path": path})), lambda prompts, responses: [])


def test_what_is_no_peft_config_is_refused(make_folder):
    pytest.importorskip("peft")
    for wrong in ({"r": 8}, "LoraConfig"):
        with pytest.raises(ValueError, match=f"`peft` must be a peft.PeftConfig.*got {type(wrong).__name__}"):
            ModelSource(path=make_folder(), peft=wrong).causal_lm()


def test_pickled_weights_are_not_read(make_lm, tmp_path):
    """Only safetensors: a pickle can run code."""
    network = make_lm()
    network.config.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, and a pickle can run code"):
        ModelSource(path=str(tmp_path)).causal_lm()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_have_the_dtype(make_folder, dtype):
    for load in LOADERS:
        network = load(ModelSource(path=make_folder(), dtype=dtype))
        assert {p.dtype for p in network.parameters()} == {getattr(torch, dtype)}


def test_attention_kernel_is_set(make_folder):
    for kernel in ("eager", "sdpa"):
        network = ModelSource(path=make_folder("llama"), attention=kernel).causal_lm()
        assert network.config._attn_implementation == kernel


def test_adapter_alone_is_trained(adapted):
    network = adapted()
    assert is_adapted(network)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not is_adapted(network.get_base_model())


# Dropout


def dropouts(network: nn.Module) -> list[float]:
    return [module.p for module in network.modules() if isinstance(module, nn.Dropout)]


def twice(network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    policy, tokens = PolicyModel(network).train(), torch.tensor([[12, 13, 14, 15, 16]])
    with torch.no_grad():
        first, second = (policy(tokens, tokens > 0, width=4) for _ in range(2))
    return first, second


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loaded_networks_do_not_drop_out_in_train_mode(make_folder, make_lm, kind):
    for load in LOADERS:
        network = load(ModelSource(path=make_folder(kind)))
        assert set(dropouts(network)) <= {0.0}
        for module in network.modules():
            assert getattr(module, "attention_dropout", 0.0) in (0.0, None) or isinstance(
                module.attention_dropout, nn.Module
            )
    assert torch.equal(*twice(ModelSource(path=make_folder(kind)).causal_lm()))
    assert not torch.equal(*twice(make_lm(kind)))  # negative control: 0.1 in the config


def test_adapter_does_not_drop_out_in_train_mode(adapted, make_folder, lora):
    peft = pytest.importorskip("peft")
    network = adapted(lora_dropout=0.5)
    assert 0.0 in dropouts(network)
    assert set(dropouts(network)) == {0.0}
    assert torch.equal(*twice(network))
    bare = without_dropout(AutoModelForCausalLM.from_pretrained(make_folder()))
    assert not torch.equal(*twice(peft.get_peft_model(bare, lora(lora_dropout=0.5))))


@pytest.mark.parametrize("kind", ["falcon", "starcoder2", "bloom", "gpt_bigcode"])
def test_no_architecture_drops_out(kind):
    big = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "falcon": lambda: FalconConfig(vocab_size=36, hidden_dropout=0.5, **big),
        "starcoder2": lambda: Starcoder2Config(vocab_size=36, residual_dropout=0.5, num_key_value_heads=2, **big),
        "bloom": lambda: BloomConfig(vocab_size=36, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.5),
        "gpt_bigcode": lambda: GPTBigCodeConfig(vocab_size=36, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.5),
    }[kind]()
    torch.manual_seed(0)
    assert torch.equal(*twice(without_dropout(AutoModelForCausalLM.from_config(config))))


# Weights and config


def edited(folder, weights=(), **config):
    """The folder with other lines in its config and more weights, all of them ones."""
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    path = Path(folder, "model.safetensors")
    tensors = load_file(path) | {name: torch.ones(size) for name, size in weights}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("scorer", [False, True])
def test_weights_that_the_config_does_not_ask_for_are_refused(make_folder, sharded, scorer):
    """Missing ones would start at random; without these the model is another just as much."""
    folder = edited(make_folder("llama", attention_bias=True), attention_bias=False)
    try:
        source = ModelSource(path=folder)
        if sharded:
            expect_shards()
            source = unread(source)
        with pytest.raises(
            ValueError, match=r"does not ask for, such as .*layers.0.self_attn.k_proj.bias \(8 in all\)"
        ):
            source.scorer(new_head=True) if scorer else source.causal_lm()
    finally:
        expect_whole()


def test_more_layers_than_the_config_has_are_refused(make_folder):
    with pytest.raises(ValueError, match=r"such as model.layers.1.input_layernorm.weight \(9 in all\)"):
        ModelSource(path=edited(make_folder("llama"), num_hidden_layers=1)).causal_lm()


def test_weights_of_other_tasks_and_old_buffers_may_lie_in_a_folder(make_folder, make_lm):
    others = [("h.0.attn.bias", (1, 1, 4, 4)), ("h.0.attn.masked_bias", ()), ("v_head.summary.weight", (1, 16))]
    network = ModelSource(path=edited(make_folder(), weights=others)).causal_lm().eval()
    tokens = torch.tensor([[12, 13, 14]])
    assert torch.equal(network(input_ids=tokens).logits, make_lm().eval()(input_ids=tokens).logits)
    ModelSource(path=make_folder("llama")).scorer(new_head=True)  # the head of a language model is left behind


@pytest.mark.parametrize("labels", [2, 5])
@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaForTokenClassification])
def test_heads_of_several_outputs_are_refused_in_our_words(make_lm, tmp_path, kind, labels):
    config = make_lm("llama").config
    config.num_labels = labels
    kind(config).save_pretrained(tmp_path / "scorer")
    for new_head in (False, True):
        with pytest.raises(ValueError, match=f"the reward head `score` has {labels} outputs; one scalar is needed"):
            ModelSource(path=str(tmp_path / "scorer")).scorer(new_head=new_head)


def test_head_with_a_bias_is_refused(make_lm, tmp_path):
    """A token classifier's head has one, for which the scorer has no place."""
    config = make_lm("llama").config
    config.num_labels = 1
    LlamaForTokenClassification(config).save_pretrained(tmp_path / "scorer")
    with pytest.raises(ValueError, match="does not ask for, such as score.bias"):
        ModelSource(path=str(tmp_path / "scorer")).scorer(new_head=False)


def test_weights_of_another_shape_are_refused_in_our_words(make_folder):
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \[36, 16\] in its weights and \[40, 16\]"):
        ModelSource(path=edited(make_folder("llama", tie_word_embeddings=True), vocab_size=40)).causal_lm()
