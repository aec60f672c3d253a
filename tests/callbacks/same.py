"""Whether two runs ended alike."""

from __future__ import annotations

from typing import Any

import torch


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """To the bit."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (x, y) in enumerate(zip(one, other, strict=True)):
            assert_same(x, y, f"{path}[{number}]")
    else:
        assert one == other, path
