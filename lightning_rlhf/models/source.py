"""Where a network comes from: a hub name, a local folder or a GGUF file, with an adapter if wanted."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DType = Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """How to obtain a network and its tokenizer when Lightning asks for them."""

    path: str
    """A local folder written by `save_pretrained`, a folder with a GGUF file, or a hub name."""
    gguf_file: str | None = None
    """Name of the GGUF file in `path`; its weights are dequantised."""
    dtype: DType = "float32"
    """Of the master weights. Lightning's precision flag decides what is computed with."""
    attention: str | None = None
    """Attention kernel: `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose."""
    peft: Any | None = None
    """A `peft.PeftConfig` such as `peft.LoraConfig`: only the adapter is trained."""
    trust_remote_code: bool = False
    """Run Python that ships with the model. Off unless you have read that code."""

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of `from_pretrained`: safetensors only, unless the file is GGUF."""
        where = Path(self.path)
        if where.is_absolute() and not where.is_dir():
            raise ValueError(f"`path`: there is no folder {self.path}; give a model folder or a hub name")
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "trust_remote_code": self.trust_remote_code}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        if self.gguf_file is None:
            return options | {"use_safetensors": True}
        if where.is_dir() and not (where / self.gguf_file).is_file():
            raise ValueError(f"`gguf_file`: there is no file {self.gguf_file} in {self.path}")
        return options | {"gguf_file": self.gguf_file}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that stands beside the weights."""
        options = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code, **options)

    def causal_lm(self) -> nn.Module:
        """A language model with a next-token head, dropout off, in the adapter where there is one."""
        network = AutoModelForCausalLM.from_pretrained(self.path, **self._options())
        return without_dropout(with_adapter(dequantised(network), self.peft, task="CAUSAL_LM"))

    def scorer(self) -> nn.Module:
        """A network with one scalar per token, dropout off; a missing head is drawn from N(0, 1/(d + 1)).

        The head's variance is Stiennon et al. 2020, appendix B.1.
        """
        network, info = AutoModelForSequenceClassification.from_pretrained(
            self.path, num_labels=1, output_loading_info=True, **self._options()
        )
        head = scalar_head(network)
        if any(key.startswith(("score.", "classifier.")) for key in info["missing_keys"]):
            logger.info("%s has no scalar head: drawing one from N(0, 1/(d+1))", self.path)
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        return without_dropout(with_adapter(dequantised(network), self.peft, task="SEQ_CLS"))


def scalar_head(network: nn.Module) -> nn.Linear:
    """The linear map d → 1 of a sequence-classification network.

    Raises:
        ValueError: there is none, or it has more than one output.
    """
    for name in ("score", "classifier"):
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear):
            if head.out_features != 1:
                raise ValueError(f"the reward head `{name}` has {head.out_features} outputs; one scalar is needed")
            return head
    raise ValueError(f"{type(network).__name__} has no linear head `score` or `classifier` to read a scalar from")


def without_dropout(network: nn.Module) -> nn.Module:
    """The same network with every dropout at 0, so that train mode leaves the ratio of the first minibatch at 1."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return network


def dequantised(network: PreTrainedModel) -> PreTrainedModel:
    """The same network without the marks of its GGUF origin, which would keep it from being saved."""
    if getattr(network, "hf_quantizer", None) is not None and not network.hf_quantizer.is_serializable():
        network.hf_quantizer = None
        for name in ("is_quantized", "quantization_method"):
            network.__dict__.pop(name, None)
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
    return network


def with_adapter(network: nn.Module, config: Any | None, *, task: str) -> nn.Module:
    """The network in a PEFT adapter, or as it is without `config`.

    Raises:
        ValueError: `peft` is not installed, or `config` is not one of its configurations.
    """
    if config is None:
        return network
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ValueError("`peft` was set but the package is missing: pip install 'lightning-rlhf[peft]'") from error
    if not isinstance(config, PeftConfig):
        raise ValueError(f"`peft` must be a peft.PeftConfig such as peft.LoraConfig: got {type(config).__name__}")
    config.task_type = config.task_type or task
    return get_peft_model(network, config)


def is_adapted(network: nn.Module) -> bool:
    """Whether the network wears a PEFT adapter that can be switched off."""
    return hasattr(network, "disable_adapter") and hasattr(network, "peft_config")
