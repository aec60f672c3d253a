"""Counts the numbers that are read from safetensors files."""

from __future__ import annotations

from collections import Counter
from typing import Any

import transformers.modeling_utils
from safetensors import safe_open
from torch import Tensor

import lightning_rlhf.models.stored_weights

READERS = (lightning_rlhf.models.stored_weights, transformers.modeling_utils)
"""Modules whose `safe_open` reads weights."""


class CountedSlice:
    """A tensor in a file: what is taken of it is counted."""

    def __init__(self, inner: Any, counted: Counter) -> None:
        self.inner, self.counted = inner, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __getitem__(self, index: Any) -> Tensor:
        found = self.inner[index]
        self.counted["numbers"] += found.numel()
        return found


def counting(counted: Counter) -> type:
    """A `safe_open` that counts."""

    class Counting:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.inner = safe_open(*args, **options)

        def __enter__(self) -> Any:
            self.inner.__enter__()
            return self

        def __exit__(self, *args: Any) -> Any:
            return self.inner.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def get_slice(self, key: str) -> CountedSlice:
            return CountedSlice(self.inner.get_slice(key), counted)

    return Counting
