"""Hidden states that predict a response: shared prompts are read once and the last token never."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lightning_rlhf.models.cache import bare, cache_name, why_no_cache


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the unmasked ones, (B, L), so that left padding shifts nothing."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def filled(tokens: Tensor, mask: Tensor) -> Tensor:
    """Replace padding by the first unmasked token of each row, (B, L).

    The embedding of a padding token may be 0; where such a position also attends to nothing, its state is 0, and norms
    have no finite gradient there, though nothing depends on it.

    Args:
        tokens: (B, L), int64.
        mask: (B, L), bool, True on real tokens.
    """
    return torch.where(mask, tokens, tokens.gather(1, mask.int().argmax(1, keepdim=True)))


@contextmanager
def casting_once(device: str) -> Iterator[None]:
    """Context in which autocast casts every weight once, instead of at each use.

    Lightning turns that cache off, because it would outlive an optimizer step; it is cleared afterwards.

    Args:
        device: type of the device.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True):
        yield
    torch.clear_autocast_cache()


class Backbone:
    """The transformer under a language model's head, and the arguments its forward accepts.

    Args:
        network: a causal language model, bare or in an adapter.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._accepted = set(inspect.signature(bare(network).forward).parameters)
        self._cache_name = cache_name(network) or ""
        self.shares_prompts = why_no_cache(network) is None
        """True if a prompt can be read once for several responses."""

    def accepts(self, name: str) -> bool:
        """Return True if the language model's forward takes an argument of this name."""
        return name in self._accepted

    @property
    def module(self) -> nn.Module:
        """The transformer without its head."""
        return bare(self.network).base_model

    def compile(self) -> None:
        """Compile each block and stop sharing prompts, because a cache would break the graphs.

        Raises:
            ValueError: transformers does not name the network's blocks.
        """
        names = set(getattr(bare(self.network), "_no_split_modules", None) or ())
        blocks = [block for block in self.module.modules() if type(block).__name__ in names]
        if not blocks:
            raise ValueError(f"`compile`: {type(bare(self.network)).__name__} names no blocks to compile; leave it out")
        for block in blocks:
            block.compile(dynamic=True)
        self.shares_prompts = False

    def states(self, tokens: Tensor, mask: Tensor, *, width: int, groups: Tensor | None = None) -> Tensor:
        """Hidden states from which the last `width` tokens of each row are predicted, (B, W, d).

        Args:
            tokens: (B, L), int64, padded on either side.
            mask: (B, L), bool, True on real tokens.
            width: W, 1 ≤ W < L.
            groups: (B,), int64; rows of one number have the same first L − W columns. None: nothing is known to be.
        """
        tokens = filled(tokens, mask)
        if groups is not None and self._sharing():
            prompts, owner = groups.unique(return_inverse=True)
            if len(prompts) < len(groups):
                return self._shared(tokens, mask, width, owner, len(prompts))
        return self._forward(tokens[:, :-1], mask[:, :-1], positions(mask)[:, :-1])[:, -width:]

    def _sharing(self) -> bool:
        """Return True if prompts are shared now: gradient checkpointing has no cache."""
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in self.network.modules())
        return self.shares_prompts and not (self.network.training and checkpointed)

    def _shared(self, tokens: Tensor, mask: Tensor, width: int, owner: Tensor, prompts: int) -> Tensor:
        """Compute the prompts' states in one pass, then the responses' in another that attends to the cache."""
        first = owner.new_full((prompts,), len(owner)).scatter_reduce(
            0, owner, torch.arange(len(owner), device=owner.device), "amin"
        )
        split, place = tokens.shape[1] - width, positions(mask)
        cache = DynamicCache()
        cached = {self._cache_name: cache, "use_cache": True}
        with casting_once(tokens.device.type):
            before = self._forward(tokens[first, :split], mask[first, :split], place[first, :split], **cached)[:, -1:]
            if width == 1:
                return before[owner]
            cache.batch_select_indices(owner)
            inside = self._forward(tokens[:, split:-1], mask[:, :-1], place[:, split:-1], **cached)
        return torch.cat([before[owner], inside], 1)

    def _forward(self, tokens: Tensor, mask: Tensor, place: Tensor, **options: Any) -> Tensor:
        if self.accepts("position_ids"):
            options["position_ids"] = place
        output = self.module(input_ids=tokens, attention_mask=mask.long(), **({"use_cache": False} | options))
        return output.last_hidden_state
