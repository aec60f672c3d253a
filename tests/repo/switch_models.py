"""Switches of networks: what is loaded, and what a network says of tokens."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from switch_bench import Bench
from switch_harness import Table, case, to
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel

TOKENS = torch.tensor([[12, 13, 14, 15, 16]])
OWN_CODE = "from transformers import GPT2LMHeadModel\n\n\nclass Own(GPT2LMHeadModel):\n    pass\n"


def table(bench: Bench) -> Table:
    def gguf_weights(source: ModelSource) -> list[Tensor]:
        return weights(replace(source, path=_gguf_folder(bench.empty())))

    def class_of_own_code(source: ModelSource) -> str:
        return _class_name(replace(source, path=_folder_with_code(bench.folder(bench.policy))), bench.empty())

    def exported(model: PolicyModel | ScalarModel) -> list[str]:
        folder = bench.empty()
        model.save_pretrained(folder)
        return sorted(path.name for path in folder.iterdir())

    lora = LoraConfig(r=2, target_modules=["c_attn"])
    return {
        ModelSource: case(
            weights,
            {"path": bench.folder(bench.policy)},
            path=to(bench.folder(bench.other_policy)),
            gguf_file=to("weights.gguf", by=gguf_weights),
            dtype=to("bfloat16", by=dtypes),
            attention=to("eager", by=kernel),
            gradient_checkpointing=to(True, by=passes_of_a_block),
            quantization=to("nf4", peft=lora, by=dtypes),
            peft=to(lora, by=trained),
            trust_remote_code=to(True, by=class_of_own_code),
        ),
        PolicyModel: case(
            says,
            {"network": bench.policy},
            network=to(bench.other_policy),
            tokenizer=to(bench.tokenizer, by=exported),
        ),
        ScalarModel: case(
            says,
            {"network": bench.scorer},
            network=to(bench.other_scorer),
            tokenizer=to(bench.tokenizer, by=exported),
        ),
    }


def weights(source: ModelSource) -> list[Tensor]:
    return list(source.causal_lm().parameters())


def dtypes(source: ModelSource) -> list[str]:
    return [str(weight.dtype) for weight in weights(source)]


def kernel(source: ModelSource) -> str:
    return source.causal_lm().config._attn_implementation


def passes_of_a_block(source: ModelSource) -> int:
    """How often a block is computed by a forward and a backward pass."""
    network, passes = source.causal_lm(), []
    network.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    network(input_ids=TOKENS).logits.sum().backward()
    return len(passes)


def trained(source: ModelSource) -> list[str]:
    return [name for name, weight in source.causal_lm().named_parameters() if weight.requires_grad]


def says(model: nn.Module) -> Any:
    with torch.no_grad():
        return model(TOKENS, TOKENS > 0, **({"width": 4} if isinstance(model, PolicyModel) else {}))


def _folder_with_code(folder: str) -> str:
    """The folder, now with Python that would serve its network under another class."""
    config = Path(folder) / "config.json"
    named = {"auto_map": {"AutoModelForCausalLM": "own.Own"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    config.with_name("own.py").write_text(OWN_CODE)
    return folder


def _class_name(source: ModelSource, cache: Path) -> str:
    """Of the network; transformers copies a folder's Python to `cache` to import it."""
    moved = mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    with moved, mock.patch.object(sys, "path", [*sys.path]):
        return type(source.causal_lm()).__name__


def _gguf_folder(folder: Path) -> str:
    """A folder whose GGUF file has twice the weights of its safetensors."""
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=36, max_position_embeddings=64, **sizes))
    network.save_pretrained(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    writer = gguf.GGUFWriter(folder / "weights.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(36)
    for name, weight in network.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), 2 * weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder)
