"""Passes without padding: the real tokens of all sequences stand in one row, and only attention tells them apart.

Linear maps, norms and activations see the real tokens alone. Attention puts each sequence back into a row of its own,
so that none attends to another, and a prompt's keys and values serve all of its responses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from lightning_rlhf.models.cache import bare, slides, why_no_cache

Kernel = Callable[..., tuple[Tensor, Any]]
"""Attention function of transformers: (module, query, key, value, mask, **options) -> (B, L, heads, d), weights."""
NAMES = {"sdpa": "packed_sdpa", "eager": "packed_eager"}
"""Attention kernels that can serve packed sequences, by the name of the one that does."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of tokens, of which the real ones also stand one behind the other.

    Attributes:
        real: which tokens of a row are real, (b, w), bool.
        aligned: the same if each row began with its real tokens.
        places: of the real tokens among the b·w aligned ones, (n,), int64.
    """

    real: Tensor
    aligned: Tensor
    places: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Self:
        """Rows of a boolean mask, (b, w)."""
        lengths = real.sum(1)
        aligned = torch.arange(max(int(lengths.max()), 1), device=real.device) < lengths[:, None]
        return cls(real=real, aligned=aligned, places=aligned.flatten().nonzero().squeeze(1))

    def __len__(self) -> int:
        """Number of real tokens, n."""
        return len(self.places)

    def padded(self, states: Tensor) -> Tensor:
        """Put (1, heads, n, d) into rows, (b, heads, width of the longest, d), with 0 behind their ends."""
        flat = states[0].transpose(0, 1)
        rows = flat.new_zeros(self.aligned.numel(), *flat.shape[1:]).index_copy(0, self.places, flat)
        return rows.unflatten(0, self.aligned.shape).transpose(1, 2)

    def flat(self, rows: Tensor) -> Tensor:
        """Take the real tokens out of aligned rows, (b, width, heads, d) -> (n, heads, d)."""
        return rows.flatten(0, 1).index_select(0, self.places)

    def spread(self, states: Tensor) -> Tensor:
        """Put (n, d) where the real tokens are, (b, w, d), with 0 elsewhere."""
        real = self.real.flatten().nonzero().squeeze(1)
        spread = states.new_zeros(self.real.numel(), states.shape[1]).index_copy(0, real, states)
        return spread.unflatten(0, self.real.shape)


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Sequences in one row, or prompts and behind them the responses that go on from them.

    Attributes:
        first: whole sequences, or each prompt once.
        then: the responses; None if the sequences are whole.
        owner: prompt of each response, (b,), int64.
    """

    first: Rows
    then: Rows | None = None
    owner: Tensor | None = None

    def attend(self, kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each sequence, to what stands before, (1, heads, N, d) -> (1, N, heads, d).

        Args:
            kernel: of the network, with its options.
            query: (1, heads, N, d).
            key: (1, heads that may be fewer, N, d).
            value: as `key`.
        """
        count = len(self.first)
        q, k, v = (self.first.padded(x[:, :, :count]) for x in (query, key, value))
        length = self.first.aligned.shape[1]
        before = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
        parts = [self.first.flat(kernel(q, k, v, before)[0])]
        if self.then is not None and self.owner is not None and len(self.then):
            q, k_own, v_own = (self.then.padded(x[:, :, count:]) for x in (query, key, value))
            k, v = torch.cat([k[self.owner], k_own], 2), torch.cat([v[self.owner], v_own], 2)
            own = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            of_prompt = self.first.aligned[self.owner][:, None].expand(-1, len(own), -1)
            visible = torch.cat([of_prompt, own.expand(len(q), -1, -1)], 2)[:, None]
            parts.append(self.then.flat(kernel(q, k, v, visible)[0]))
        return torch.cat(parts)[None]


def _sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> tuple[Tensor, Any]:
    causal = len(visible) == 1 and q.shape[2] == k.shape[2]  # the kernel's own triangle is faster than a mask
    return sdpa_attention_forward(module, q, k, v, None if causal else visible, is_causal=causal, **options)


def _eager(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> tuple[Tensor, Any]:
    hidden = torch.finfo(q.dtype).min
    added = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, hidden)
    return _eager_of(module)(module, q, k, v, added, **options)


def _eager_of(module: nn.Module) -> Kernel:
    """Return the attention function that stands beside a module's class."""
    kernel: Kernel = sys.modules[type(module).__module__].eager_attention_forward
    return kernel


def _sdpa_or_packed(module: nn.Module, *given: Any, packing: Packing | None = None, **options: Any) -> Any:
    if packing is None:
        return sdpa_attention_forward(module, *given, **options)
    return packing.attend(partial(_sdpa, module, **_without_mask(options)), *given[:3]), None


def _eager_or_packed(module: nn.Module, *given: Any, packing: Packing | None = None, **options: Any) -> Any:
    if packing is None:
        return _eager_of(module)(module, *given, **options)
    return packing.attend(partial(_eager, module, **_without_mask(options)), *given[:3]), None


def _without_mask(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("attention_mask", "is_causal")}


AttentionInterface.register(NAMES["sdpa"], _sdpa_or_packed)
AttentionInterface.register(NAMES["eager"], _eager_or_packed)
AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
AttentionMaskInterface.register(NAMES["eager"], eager_mask)


def use_packing(network: nn.Module) -> None:
    """Let a network's attention serve packed sequences beside padded ones, which it computes as before.

    Raises:
        ValueError: it is not certain that no sequence would attend to another.
    """
    model = bare(network)
    if (reason := _why_not(model)) is not None:
        raise ValueError(f"`updates.packing` cannot be used with {type(model).__name__}: {reason}; set it to false")
    if model.config._attn_implementation in NAMES:
        model.set_attn_implementation(NAMES[model.config._attn_implementation])


def _why_not(model: Any) -> str | None:
    used = str(model.config._attn_implementation)
    if used not in (*NAMES, *NAMES.values()):
        return f"its attention is {used}, and only sdpa and eager are told sequences apart here"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward takes no `position_ids`"
    if (reason := why_no_cache(model)) is not None:
        return reason
    if slides(model):
        return "it attends to a sliding window"
    if not model._can_set_attn_implementation():
        return "its attention cannot be exchanged"
    return None
