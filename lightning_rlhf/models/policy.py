"""The policy: a causal language model that says how likely a response is."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core.logprobs import entropy, token_logprobs
from lightning_rlhf.models.adapter import is_adapted, merged
from lightning_rlhf.models.folder import write_folder


class TokenStats(NamedTuple):
    """What a policy says of the last W tokens of each row.

    Attributes:
        logprobs: log π(token | before), (B, W), float32 or float64, nats.
        entropy: entropy of the next-token distribution, (B, W), nats; zeros where it was not asked for.
    """

    logprobs: Tensor
    entropy: Tensor


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the real ones, (B, L), so that left padding moves nothing."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class PolicyModel(nn.Module):
    """π: wraps a transformers causal language model, bare or in a PEFT adapter.

    Args:
        network: the language model.
        tokenizer: for its end and padding tokens and for export; None where the caller handles token ids only.
    """

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        base = network.get_base_model() if is_adapted(network) else network
        self._accepts = set(inspect.signature(base.forward).parameters)

    def forward(
        self, tokens: Tensor, mask: Tensor, *, width: int, temperature: float = 1.0, with_entropy: bool = False
    ) -> TokenStats:
        """log π of the last `width` tokens; logits are made for those positions only.

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: (B, L), bool, True on real tokens.
            width: W, 1 ≤ W < L.
            temperature: τ the logits are divided by.
            with_entropy: also the exact entropy, at the price of a softmax.
        """
        logits = self.logits(tokens, mask, keep=width + 1)[:, :-1]
        logprobs = token_logprobs(logits, tokens[:, -width:], temperature)
        return TokenStats(logprobs, entropy(logits, temperature) if with_entropy else torch.zeros_like(logprobs))

    def logits(self, tokens: Tensor, mask: Tensor, *, keep: int) -> Tensor:
        """Next-token logits of the last `keep` positions, (B, keep, V)."""
        options = {"position_ids": positions(mask)} if "position_ids" in self._accepts else {}
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = keep
        return self.network(input_ids=tokens, attention_mask=mask.long(), use_cache=False, **options).logits[:, -keep:]

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: those of the generation config, else of the config, else the tokenizer's.

        Raises:
            ValueError: nothing names an end token.
        """
        for holder in (getattr(self.network, "generation_config", None), self.network.config, self.tokenizer):
            found = getattr(holder, "eos_token_id", None)
            if found not in (None, []):
                return [found] if isinstance(found, int) else list(found)
        raise ValueError("neither model nor tokenizer names an end token: set `eos_token_id` in generation_config.json")

    def reference(self) -> AbstractContextManager[object]:
        """Inside it the policy is what it was before training: the adapter is off."""
        return self.network.disable_adapter() if is_adapted(self.network) else nullcontext()

    def frozen_copy(self) -> PolicyModel:
        """A copy without gradient, in eval mode."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, *, merge_adapter: bool = False) -> None:
        """Write a Hugging Face folder: weights, config, generation config, tokenizer with its template.

        Args:
            folder: written whole or not at all; what stood there before is replaced.
            merge_adapter: fold a LoRA adapter into the weights; otherwise an adapter folder is written.

        Raises:
            ValueError: `merge_adapter` without an adapter.
        """
        network = merged(self.network) if merge_adapter else self.network
        with write_folder(folder) as target:
            network.save_pretrained(target)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
