"""Writing of a network's weights and config to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.models.source import DType


def write_network(network: Any, folder: Path, dtype: DType | None = None) -> None:
    """Write a transformers or PEFT network to a folder.

    Args:
        network: as transformers or PEFT built it.
        folder: takes the files.
        dtype: of the floating-point weights there; None is that of the network.
    """
    if dtype is None:
        network.save_pretrained(folder)
        return
    network.save_pretrained(folder, state_dict=_cast(network.state_dict(), getattr(torch, dtype)))
    config = folder / "config.json"
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(values | {"dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the weights to another precision; tied weights stay tied."""
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    converted = {}
    for name, weight in state.items():
        key = weight.data_ptr(), weight.shape
        if key not in cast:
            cast[key] = weight.to(dtype) if weight.is_floating_point() else weight
        converted[name] = cast[key]
    return converted
