"""Where networks come from, and that none of them drops out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTBigCodeConfig, Starcoder2Config

from lightning_rlhf.models import ModelSource, PolicyModel
from lightning_rlhf.models.adapter import is_adapted
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
