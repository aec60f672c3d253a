"""Network with a scalar per token: the reward model and the value network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core.logprobs import full_precision
from lightning_rlhf.folders.atomic import write_folder
from lightning_rlhf.models.adapter import is_adapted, merged
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.models.quantization import is_quantized, keep_adapter_only
from lightning_rlhf.models.replica import Blueprint, whole
from lightning_rlhf.models.sharding import shard
from lightning_rlhf.models.source import DType, ModelSource, scalar_head
from lightning_rlhf.models.written import write_network
from lightning_rlhf.text import end_tokens
from lightning_rlhf.types import Rollout


def score_at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Select the score at the last unmasked token of each row, found by length and not by the padding id.

    Args:
        scores: per token, (B, L).
        mask: real tokens, (B, L), bool, at least one per row.

    Returns:
        (B,).
    """
    steps = torch.arange(mask.shape[1], device=mask.device)
    return scores.gather(1, torch.where(mask, steps, -1).amax(1, keepdim=True)).squeeze(1)


class ScalarModel(nn.Module):
    """Backbone with a linear head d → 1 and a bias that puts labeler demonstrations at 0 on average.

    Args:
        network: a transformers sequence-classification model with one label, bare or in a PEFT adapter. Its pooling,
            which looks for the padding id, is not used.
        tokenizer: for export and for text; None if the caller handles token ids only.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.network: Any = network  # with the methods of transformers
        self.tokenizer = tokenizer
        self.backbone = Backbone(network)
        if is_quantized(network):
            keep_adapter_only(self)
        self.blueprint: Blueprint | None = None
        """Structure of a sharded model; None for a full one."""
        scalar_head(self._bare())
        self.bias = float(getattr(network.config, "demonstration_bias", 0.0))
        """Added to the raw score: −(mean raw score of the demonstrations). A Python float (see `Adaptive`)."""

    @classmethod
    def load(cls, source: ModelSource, *, new_head: bool) -> ScalarModel:
        """Load a model with its bias from a folder; `new_head` also accepts a language model's backbone."""
        return cls(source.scorer(new_head=new_head), source.tokenizer())

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return scores of every token with the bias, (B, L), float32 or float64.

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: real tokens, (B, L), bool.
        """
        return full_precision(self._bare().score(self.backbone.all_states(tokens, mask))).squeeze(-1) + self.bias

    def response_values(self, rollout: Rollout) -> Tensor:
        """Return V of the state before each response token, (B, R), in reward units."""
        return self(rollout.tokens, rollout.attention_mask)[:, rollout.prompt_width - 1 : -1]

    @contextmanager
    def without_bias(self) -> Iterator[None]:
        """Context in which scores are raw, bit for bit."""
        bias, self.bias = self.bias, 0.0
        try:
            yield
        finally:
            self.bias = bias

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard every weight over the mesh; then all processes must call the model together."""
        self.keep_shards(shard(self, mesh))

    def keep_shards(self, blueprint: Blueprint) -> None:
        """Mark the weights as sharded, so that every pass needs all processes."""
        self.blueprint = blueprint

    def _bare(self) -> Any:
        """Return the sequence-classification model under an adapter."""
        return self.network.get_base_model() if is_adapted(self.network) else self.network

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Context that computes in float32, whatever the precision of training.

        Half-precision weights are float32 meanwhile, without loss; those of a sharded model stay as they are.
        """
        tensors = [*self.parameters(), *self.buffers()] if self.blueprint is None else []
        halves = [tensor for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)]
        weights = [tensor.data for tensor in halves]
        default = torch.get_default_dtype()
        for tensor in halves:
            tensor.data = tensor.data.float()
        torch.set_default_dtype(torch.float32 if default in (torch.bfloat16, torch.float16) else default)
        try:
            with torch.autocast(next(self.parameters()).device.type, enabled=False):
                yield
        finally:
            torch.set_default_dtype(default)
            for tensor, before in zip(halves, weights, strict=True):
                tensor.data = before

    def _padding_token(self) -> int | None:
        """Choose a padding token that is no end token. Otherwise transformers would score the token before."""
        named = (self.network.config, self.tokenizer)
        ends = end_tokens(self.tokenizer, getattr(self.network.config, "eos_token_id", None))
        names = [(holder, name) for name in ("pad", "unk", "bos") for holder in named]
        tokens = [getattr(holder, f"{name}_token_id", None) for holder, name in names]
        return next((token for token in tokens if token is not None and token not in ends), None)

    def get_extra_state(self) -> dict[str, float]:
        """Return the demonstration bias for `state_dict`."""
        return {"demonstration_bias": self.bias}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Restore the demonstration bias of a checkpoint."""
        self.bias = float(state["demonstration_bias"])

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write a folder that `AutoModelForSequenceClassification` loads, `demonstration_bias` in its config.

        Args:
            folder: written whole or not at all. Of a sharded model the first process writes it, and all of them must
                call this.
            merge_adapter: fold a LoRA adapter into the weights.
            dtype: of the weights in the folder; None is that in which they were trained.
        """
        network: Any = whole(self.network, self.blueprint)
        if network is None:
            return
        if merge_adapter:
            network = merged(network)
        network.config.demonstration_bias = self.bias
        network.config.pad_token_id = self._padding_token()
        with write_folder(folder) as target:
            write_network(network, target, dtype)
            if not (target / "config.json").is_file():  # in an adapter's folder; the bias stands in it
                network.config.save_pretrained(target)
            if self.tokenizer is not None:
                self._padding_tokenizer(network.config.pad_token_id).save_pretrained(target)

    def _padding_tokenizer(self, padding: int | None) -> PreTrainedTokenizerBase:
        """Copy the tokenizer with right padding by a token, or unchanged if there is none."""
        tokenizer: Any = deepcopy(self.tokenizer)
        if padding is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
            tokenizer.padding_side = "right"
        return tokenizer
