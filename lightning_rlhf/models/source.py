"""Sources of networks: a hub name, a local folder or a GGUF file with an optional adapter."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.folders.fingerprint import fingerprint
from lightning_rlhf.folders.inspection import check_tokenizer, check_weights, holds_tokenizer, loading
from lightning_rlhf.folders.location import local_folder
from lightning_rlhf.models.adapter import base_of, holds_adapter, holds_reward_adapter, merged_adapter, with_adapter
from lightning_rlhf.models.cache import bare
from lightning_rlhf.models.quantization import Quantization, quantized_by, settle
from lightning_rlhf.models.stored_weights import check_shapes, check_unexpected

logger = logging.getLogger(__name__)

_NO_HEAD = (
    "{} has no trained scalar head: it is a language model; train a RewardModule on it and give the folder that its "
    "`save_pretrained` writes"
)
DType = Literal["float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Recipe for a network and its tokenizer, built when Lightning asks for them."""

    path: str
    """A local folder written by `save_pretrained`, a folder with a GGUF file, or a hub name (NAME or OWNER/NAME). An
    adapter found in a folder is folded into its base model."""
    gguf_file: str | None = None
    """Name of the GGUF file in `path`; its weights are dequantized."""
    dtype: DType = "float32"
    """Dtype of the master weights. Lightning's precision flag decides the dtype of computation."""
    attention: str | None = None
    """Attention kernel: `sdpa`, `eager`, `flash_attention_2`; None lets transformers choose. One of a hub,
    `OWNER/NAME`, is code and needs `trust_remote_code`."""
    gradient_checkpointing: bool = False
    """Keep one activation per block and compute the others again in the backward pass: less memory, a third more time.
    Sampling keeps its cache."""
    quantization: Quantization | None = None
    """Hold the frozen weights of linear maps under an adapter in 4 bits (`nf4`, QLoRA) or 8 (`int8`); `dtype` is that
    of the computation. Needs `peft` and the package bitsandbytes."""
    peft: Any | None = None
    """A `peft.PeftConfig` such as `peft.LoraConfig`: only the adapter is trained."""
    trust_remote_code: bool = False
    """Run Python that ships with the model. Off unless you have read that code; the command line takes it as a flag
    only, never from a config file."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expanduser(self.path))  # `~` is the home directory
        if self.quantization is not None:
            self._check_quantization()
        if self.attention is not None and "/" in self.attention and not self.trust_remote_code:
            raise ValueError(
                f"`attention` names code of a hub, {self.attention!r}: use `sdpa`, `eager` or `flash_attention_2`, or "
                "set `trust_remote_code` if you have read that code"
            )

    def _check_quantization(self) -> None:
        reason = None
        if self.quantization not in get_args(Quantization):
            reason = f"there are only {' and '.join(get_args(Quantization))}"
        elif self.peft is None:
            reason = "only an adapter can be trained on them: set `peft`, such as peft.LoraConfig"
        elif self.gguf_file is not None:
            reason = "those of a GGUF file are rounded already: give a folder of safetensors"
        elif self.dtype == "float64":
            reason = "nothing computes with them in float64: set `dtype` to bfloat16"
        if reason is not None:
            raise ValueError(f"`quantization`={self.quantization} rounds the weights, and {reason}")

    def identity(self) -> dict[str, Any]:
        """Describe what decides the network: a local folder's content, or else its path."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "path"}
        folder = Path(self.path)
        if not self.path or not folder.is_dir():
            return values | {"path": self.path}
        values["folder"] = fingerprint(folder, weights=self.gguf_file or "*.safetensors")
        if holds_adapter(folder):
            with suppress(ValueError):  # a broken one is told of when it is loaded
                values["base"] = self._base()
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer stored with the weights.

        Raises:
            ValueError: there is no such folder or file, or it holds no tokenizer that can be loaded.
        """
        options = self._place() | {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None and not holds_adapter(self.path):
            options["gguf_file"] = self.gguf_file
        elif options["local_files_only"]:
            check_tokenizer(Path(self.path))
        with loading("a tokenizer", self.path):
            return AutoTokenizer.from_pretrained(self.path, **options)

    @property
    def has_tokenizer(self) -> bool:
        """True if a tokenizer is stored with the weights; assumed for a hub name."""
        folder = local_folder(self.path)
        return folder is None or self.gguf_file is not None or holds_tokenizer(folder)

    def causal_lm(self) -> nn.Module:
        """Build a language model with a next-token head without dropout, in its adapter if there is one.

        Raises:
            ValueError: there is no such folder or file, or it holds no such model.
        """
        self._check_unfolded()
        if holds_adapter(self.path):
            network = merged_adapter(self._base().causal_lm(), self.path, task="CAUSAL_LM")
        else:
            network, missing = self._load(AutoModelForCausalLM)
            self._check_whole(missing)
        if self.quantization is not None:
            settle(network, partial(ModelSource.causal_lm, self._in_full()))
        return self._finished(network, task="CAUSAL_LM")

    def scorer(self, *, new_head: bool) -> nn.Module:
        """Build a network with one scalar per token without dropout, in its adapter if there is one.

        Args:
            new_head: draw a missing head from N(0, 1/(d + 1)) (Stiennon et al. 2020, appendix B.1).

        Raises:
            ValueError: there is no such folder or file, or the head is missing and must not be drawn.
        """
        self._check_unfolded()
        if not holds_adapter(self.path):
            network: Any = self._whole_scorer(new_head=new_head)
            if self.quantization is not None:
                settle(network, partial(ModelSource.scorer, self._in_full(), new_head=True))
        elif holds_reward_adapter(self.path):
            network = merged_adapter(self._base().scorer(new_head=True), self.path, task="SEQ_CLS")
            network.config.demonstration_bias = self._bias()
        elif new_head:
            network = merged_adapter(self._base().scorer(new_head=True), self.path, task="SEQ_CLS")
        else:
            raise ValueError(_NO_HEAD.format(self.path))
        return self._finished(network, task="SEQ_CLS")

    def _check_unfolded(self) -> None:
        """Raise if the weights would be quantized after an adapter was folded into them."""
        if self.quantization is not None and holds_adapter(self.path):
            raise ValueError(
                f"`quantization`={self.quantization}: {self.path} holds an adapter without its model: write the two "
                "together first, by `save_pretrained(..., merge_adapter=True)`"
            )

    def _in_full(self) -> ModelSource:
        return replace(self, peft=None, quantization=None)

    def _finished(self, network: nn.Module, *, task: str) -> nn.Module:
        """Add the adapter and remove dropout; sets train mode for gradient checkpointing, which needs it."""
        network = without_dropout(with_adapter(network, self.peft, task=task))
        return recomputing(network) if self.gradient_checkpointing else network

    def _whole_scorer(self, *, new_head: bool) -> nn.Module:
        network, missing = self._load(AutoModelForSequenceClassification, num_labels=1)
        head = scalar_head(network)
        self._check_whole([key for key in missing if not key.startswith("score.")])
        if any(key.startswith("score.") for key in missing):
            if not new_head:
                raise ValueError(_NO_HEAD.format(self.path))
            logger.info("%s has no scalar head: drawing one from N(0, 1/(d+1))", self.path)
            drawn = torch.empty(head.weight.shape, dtype=head.weight.dtype, device="cpu")  # the same for every device
            head.weight.data.copy_(nn.init.normal_(drawn, std=(head.in_features + 1) ** -0.5))
        return network

    def _bias(self) -> float:
        with loading("the config of a reward model", self.path):
            return float(AutoConfig.from_pretrained(self.path, local_files_only=True).demonstration_bias)

    def _base(self) -> ModelSource:
        """Return the source of the model that this folder's adapter belongs to."""
        return replace(self, path=base_of(self.path), peft=None)

    def _load(self, kind: Any, **options: Any) -> tuple[Any, list[str]]:
        """Load the network and return it with the names of weights missing from the folder."""
        place = self._place()
        if place["local_files_only"] and self.gguf_file is None:
            check_weights(Path(self.path))
        with loading("a model", self.path):
            network, info = kind.from_pretrained(
                self.path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # or transformers would name that option as the way out
                **place,
                **self._options(),
                **options,
            )
        check_shapes(self.path, info["mismatched_keys"])
        if self.gguf_file is None:
            check_unexpected(network, self.path, info["unexpected_keys"])
        return dequantized(network), sorted(info["missing_keys"])

    def _options(self) -> dict[str, Any]:
        """Build the keyword arguments of `from_pretrained`: safetensors only, unless the file is GGUF."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "trust_remote_code": self.trust_remote_code}
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        if self.quantization is not None:
            options |= quantized_by(self.quantization, options["dtype"])
        return options | ({"use_safetensors": True} if self.gguf_file is None else {"gguf_file": self.gguf_file})

    def _check_whole(self, missing: list[str]) -> None:
        if missing and self.gguf_file is None:
            raise ValueError(
                f"`path`: {self.path} lacks {len(missing)} of the weights that its config asks for, such as "
                f"{missing[0]}; they would start at random: copy the folder again"
            )

    def _place(self) -> dict[str, Any]:
        """Return `local_files_only`, which is False for a hub name alone.

        Raises:
            ValueError: there is no such folder or file.
        """
        folder = local_folder(self.path)
        gguf = None if self.gguf_file is None or folder is None or holds_adapter(folder) else folder / self.gguf_file
        if gguf is not None and not gguf.is_file():
            raise ValueError(f"`gguf_file`: there is no file {self.gguf_file} in {self.path}")
        return {"local_files_only": folder is not None}


def scalar_head(network: nn.Module) -> nn.Linear:
    """Return the linear map d → 1 that a decoder's sequence-classification network applies to every token.

    Raises:
        ValueError: there is none, as in encoders that classify a pooled token, or it has more than one output.
    """
    head = getattr(network, "score", None)
    head = getattr(head, "original_module", head)  # PEFT wraps the head to train it
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(network).__name__} has no linear head `score`: a reward is read at the last token of a decoder "
            "with a sequence-classification head, such as LlamaForSequenceClassification"
        )
    if head.out_features != 1:
        raise ValueError(f"the reward head `score` has {head.out_features} outputs; one scalar is needed")
    return head


def without_dropout(network: nn.Module) -> nn.Module:
    """Set every dropout to 0, so that train mode leaves the first ratio of a rollout at 1."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
    return network


def dequantized(network: Any) -> Any:
    """Remove the marks of a network's GGUF origin, which would prevent saving it."""
    if getattr(network, "hf_quantizer", None) is not None and not network.hf_quantizer.is_serializable():
        network.hf_quantizer = None
        for name in ("is_quantized", "quantization_method"):
            network.__dict__.pop(name, None)
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
    return network


def recomputing(network: nn.Module) -> nn.Module:
    """Turn on gradient checkpointing, so that the backward pass recomputes activations."""
    model, options = bare(network), {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers renamed it
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return network.train()
