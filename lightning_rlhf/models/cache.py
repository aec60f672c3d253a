"""Key-value caches: support by network, and buffers that grow without a copy per token."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_rlhf.models.adapter import is_adapted

SPARE = 64
"""Number of columns by which a cache grows at a time."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers with spare columns, so that a new token copies nothing else.

    It also serves layers with a sliding window: the mask, not the cache, hides what lies outside. Nothing in it has a
    gradient.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns and return all keys and values, (B, heads, C, d) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        used, total = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self._fits(total):
            self._buffers = [_widened(x, total + SPARE) for x in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, used:total] = states
        self.keys, self.values = (buffer[:, :, :total] for buffer in self._buffers)
        return self.keys, self.values

    def _fits(self, columns: int) -> bool:
        """Return True if the buffers match the current rows and have room."""
        if not self._buffers or self._buffers[0].shape[2] < columns:
            return False
        return self._buffers[0].data_ptr() == self.keys.data_ptr() and len(self._buffers[0]) == len(self.keys)


class FixedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of fixed address and width, as CUDA graphs need.

    It reports the newest token in the last column, so that the mask alone hides what lies after it.

    Args:
        layer: whose keys and values it goes on from.
        column: to be written next, (1,), int64; shared by all layers and moved by whoever holds them.
        width: columns of the buffers.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, column: Tensor, width: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = (_widened(x, width, zero=True) for x in (layer.keys, layer.values))
        self.column = column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one column and return all keys and values, (B, heads, width, d) each."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of columns before the token that is read."""
        return self.keys.shape[2] - 1


def fixed_cache(cache: Cache, column: Tensor, width: int) -> Cache:
    """Copy keys and values into a cache of `FixedLayer`s."""
    return Cache(layers=[FixedLayer(layer, column, width) for layer in cache.layers])


def grown_cache(cache: Cache, used: int) -> Cache:
    """Copy the first columns of a fixed cache into one that can grow."""
    grown = growing_cache()
    layer: Any
    for number, layer in enumerate(cache.layers):
        grown.update(layer.keys[:, :, :used], layer.values[:, :, :used], number)
    return grown


def _widened(states: Tensor, columns: int, *, zero: bool = False) -> Tensor:
    rows, heads, used, size = states.shape
    buffer = (states.new_zeros if zero else states.new_empty)(rows, heads, columns, size)
    buffer[:, :, :used] = states
    return buffer


def bare(network: Any) -> Any:
    """Return the transformers model under an adapter."""
    return network.get_base_model() if is_adapted(network) else network


def cache_name(network: nn.Module) -> str | None:
    """Name of the forward's cache argument, which transformers renamed; returns None if it takes none."""
    names = inspect.signature(bare(network).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def why_no_cache(network: nn.Module) -> str | None:
    """Return why the network's cache cannot be cut by rows and columns; returns None if it can."""
    config = bare(network).config
    if cache_name(network) is None:
        return "its forward takes no key-value cache"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if getattr(config, "attention_chunk_size", None):
        return "it attends within chunks of absolute columns"
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"transformers makes no dynamic cache for it ({error})"
    other = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    return f"its cache is made of {', '.join(sorted(other))}" if other else None


def slides(network: nn.Module) -> bool:
    """Return True if a layer attends to a sliding window, counted from the token that is read."""
    layers = DynamicCache(config=bare(network).config).layers
    return any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)


def growing_cache() -> Cache:
    """Create an empty cache of `GrowingLayer`s, one per layer on first use."""
    return Cache(layer_class_to_replicate=GrowingLayer)
