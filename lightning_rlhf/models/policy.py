"""The policy: a causal language model that returns log-probs of responses."""

from __future__ import annotations

import copy
import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core.linear_logprobs import linear_logprobs
from lightning_rlhf.core.logprobs import token_logprobs
from lightning_rlhf.core.vocabulary import Predictions
from lightning_rlhf.folders.atomic import write_folder
from lightning_rlhf.models.adapter import adapter_off, is_adapted, merged
from lightning_rlhf.models.backbone import Backbone, filled, positions
from lightning_rlhf.models.cache import bare
from lightning_rlhf.models.head import is_linear
from lightning_rlhf.models.quantization import is_quantized, keep_adapter_only
from lightning_rlhf.models.replica import Blueprint, whole
from lightning_rlhf.models.sharding import shard
from lightning_rlhf.models.source import DType
from lightning_rlhf.models.written import write_network
from lightning_rlhf.text import end_tokens
from lightning_rlhf.types import Rollout, TextBatch

logger = logging.getLogger(__name__)


class PolicyModel(nn.Module):
    """Policy π: a transformers causal language model, bare or in a PEFT adapter.

    Args:
        network: the language model.
        tokenizer: for its end and padding tokens and for export; None if the caller handles token ids only.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.network: Any = network  # with the methods of transformers
        self.tokenizer = tokenizer
        self.backbone = Backbone(network)
        if is_quantized(network):
            keep_adapter_only(self)
        self.blueprint: Blueprint | None = None
        """Structure of a sharded policy; None for a full one."""
        self._linear_head: bool | None = None  # found out by the first forward

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        width: int,
        temperature: float = 1.0,
        wanted: Tensor | None = None,
        groups: Tensor | None = None,
        raw: bool = False,
    ) -> Tensor:
        """Return log π(token | before) of the last `width` tokens, (B, W), in nats; 0 where not wanted.

        The dtype is float32 or float64.

        The head is applied to wanted positions alone and its (B, W, V) logits are never whole, where the network's
        logits are a linear map of its hidden states (`linear_logprobs`).

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: (B, L), bool, True on real tokens.
            width: W, 1 ≤ W < L.
            temperature: τ the logits are divided by.
            wanted: (B, W), bool; None: the real tokens.
            groups: (B,), int64; rows of one number have the same first L − W columns, which are then read once.
            raw: return what the wanted tokens are predicted from instead, one row each: hidden states, or logits where
                these are no linear map of them.
        """
        wanted = mask[:, -width:] if wanted is None else wanted
        head = self._head(tokens)
        if head is None:
            logits = self.logits(tokens, mask, keep=width + 1)[:, :-1]
            if raw:
                return logits[wanted]
            return torch.where(wanted, token_logprobs(logits, tokens[:, -width:], temperature), 0.0)
        states = self.backbone.states(tokens, mask, width=width, groups=groups)
        if raw:
            return states[wanted]
        chosen = tokens[:, -width:][wanted]
        logprobs = linear_logprobs(states[wanted], head.weight, chosen, bias=head.bias, temperature=temperature)
        return logprobs.new_zeros(wanted.shape).masked_scatter(wanted, logprobs)

    def logits(self, tokens: Tensor, mask: Tensor, *, keep: int) -> Tensor:
        """Return the next-token logits of the last `keep` positions, (B, keep, V)."""
        options: dict[str, Any] = {"input_ids": filled(tokens, mask), "attention_mask": mask.long(), "use_cache": False}
        if self.backbone.accepts("logits_to_keep"):
            options["logits_to_keep"] = keep
        if self.backbone.accepts("position_ids"):
            options["position_ids"] = positions(mask)
        return self.network(**options).logits[:, -keep:]

    def response_logprobs(self, rollout: Rollout, *, temperature: float) -> Tensor:
        """Return log π of each response token, (B, R), in nats; 0 outside the responses.

        Args:
            rollout: B responses.
            temperature: τ the logits are divided by.
        """
        return self(
            rollout.tokens,
            rollout.attention_mask,
            width=rollout.response_mask.shape[1],
            wanted=rollout.response_mask,
            temperature=temperature,
            groups=rollout.prompt_index,
        )

    def response_predictions(self, rollout: Rollout) -> Predictions:
        """Return what each response token of a rollout is predicted from, N rows in the order of `response_mask`."""
        head = self._head(rollout.tokens)
        inputs = self(
            rollout.tokens,
            rollout.attention_mask,
            width=rollout.response_mask.shape[1],
            wanted=rollout.response_mask,
            groups=rollout.prompt_index,
            raw=True,
        )
        return Predictions(inputs) if head is None else Predictions(inputs, head.weight, head.bias)

    def text_logprobs(self, text: TextBatch) -> Tensor:
        """Return log π of tokens 1 .. L − 1 of each text, (B, L − 1), in nats; 0 where no target."""
        targets = text.target[:, 1:]
        return self(text.tokens, text.mask, width=targets.shape[1], wanted=targets)

    def compile_backbone(self) -> None:
        """Compile every block with `torch.compile`; sampling uses an uncompiled copy.

        Because blocks are alike, the compiler works once for all of them, instead of minutes for the whole.

        Raises:
            ValueError: the network is quantized.
        """
        if is_quantized(self.network):
            raise ValueError("`compile` and `quantization` do not go together: leave one out")
        self.backbone.compile()

    def _head(self, tokens: Tensor) -> nn.Linear | None:
        """Return the head if the logits are its linear map of the hidden states and no hook observes it."""
        head = bare(self.network).get_output_embeddings()
        if self.blueprint is not None or type(head) is not nn.Linear:  # a shard's weight is whole in its own forward
            return None
        if any(m._forward_hooks or m._forward_pre_hooks for m in (head, self.network, bare(self.network))):
            return None
        if self._linear_head is None:
            self._linear_head = is_linear(self.network, self.backbone.module, head, tokens[:1, -2:])
            if not self._linear_head:
                logger.info("%s does more than its head to make logits: all of them are computed", type(self.network))
        return head if self._linear_head else None

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end a response, by tokenizer and chat template or the configs.

        Those of the tokenizer and its template are joined by the generation config's or else the config's.

        Raises:
            ValueError: nothing names an end token.
        """
        ends = self._ends()
        if ends:
            return ends
        raise ValueError("neither model nor tokenizer names an end token: set `eos_token_id` in generation_config.json")

    def computing_dtype(self, device: str) -> torch.dtype:
        """Return the dtype of training: that of autocast, or else of the weights.

        Args:
            device: type of the device, whose autocast is asked.
        """
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(self.parameters()).dtype

    def reference(self) -> AbstractContextManager[object]:
        """Context in which the policy is π_ref: its adapter is off.

        Raises:
            ValueError: with its adapter off it is not.
        """
        return adapter_off(self.network) if is_adapted(self.network) else nullcontext()

    def shard(self, mesh: DeviceMesh) -> None:
        """Shard every weight over the mesh; then all processes must call the policy together."""
        self.keep_shards(shard(self, mesh))

    def keep_shards(self, blueprint: Blueprint) -> None:
        """Mark the weights as sharded, so that every pass needs all processes."""
        self.blueprint = blueprint
        self.backbone.shares_prompts = False  # or the number of passes would depend on a process's own prompts

    def frozen_copy(self, dtype: torch.dtype | None = None) -> PolicyModel:
        """Copy an unsharded policy without gradient, in eval mode.

        Args:
            dtype: of its weights; buffers stay as they are. None is the policy's.
        """
        clone = copy.deepcopy(self).eval().requires_grad_(False)
        for weight in clone.parameters() if dtype is not None else ():
            weight.data = weight.data.to(dtype)
        return clone

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False, dtype: DType | None = None) -> None:
        """Write a Hugging Face folder: weights with configs and the tokenizer with its template.

        Args:
            folder: written whole or not at all; an earlier export there is replaced. Of a sharded policy the first
                process writes it, and all of them must call this.
            merge_adapter: fold a LoRA adapter into the weights; otherwise an adapter folder is written.
            dtype: of the weights in the folder; None is that in which they were trained.

        Raises:
            ValueError: `merge_adapter` without an adapter.
        """
        network = whole(self.network, self.blueprint)
        if network is None:
            return
        network = merged(network) if merge_adapter else network
        with write_folder(folder) as target:
            write_network(network, target, dtype)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
            self._name_ends(target / "generation_config.json")

    def _ends(self) -> list[int]:
        holders = (getattr(self.network, "generation_config", None), self.network.config)
        named = [getattr(holder, "eos_token_id", None) for holder in holders]
        return end_tokens(self.tokenizer, next((ids for ids in named if ids not in (None, [])), None))

    def _name_ends(self, file: Path) -> None:
        """List every token that ends a response in the generation config if one was written."""
        if not file.is_file():
            return
        config, ends = json.loads(file.read_text(encoding="utf-8")), self._ends()
        if set(ends) == set(end_tokens(None, config.get("eos_token_id"))):
            return
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
