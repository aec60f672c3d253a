"""The network that samples: the policy's structure with weights of its own, made for a rollout and then let go."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf.models.adapter import is_adapted

logger = logging.getLogger(__name__)

PACKED_DTYPES = (torch.float32, torch.bfloat16)
_UNPACKABLE: set[str] = set()
WORTH_PACKING = 8
"""Passes from which on it pays to pack the weights."""


def make_actor(network: nn.Module, dtype: torch.dtype, *, passes: int) -> nn.Module:
    """The network in eval mode, in `dtype`, its adapter folded in; on a CPU its linear maps are packed.

    Weights that need no change are shared with the network, which stays as it is. Buffers keep their precision: rotary
    frequencies must not be rounded.

    Args:
        network: a causal language model, bare or in an adapter.
        dtype: of the weights that sample.
        passes: forward passes to come; packing is worth its while only for some.
    """
    actor = _unpacked(network, dtype)
    known = type(actor).__qualname__
    if passes < WORTH_PACKING or known in _UNPACKABLE or not _can_pack(next(actor.parameters()).device.type, dtype):
        return actor
    expected = _probe(actor)
    _pack(actor)
    try:
        if torch.allclose(_probe(actor), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
            return actor
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # it reads the weights by itself
        logger.info("the weights of %s stay as they are: it does not work with packed ones", known)
    _UNPACKABLE.add(known)
    return _unpacked(network, dtype)


def _unpacked(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    folds = is_adapted(network) and hasattr(network, "merge_and_unload")
    actor = _twin(network, lambda weight: weight.detach().to(dtype, copy=folds))
    return actor.merge_and_unload() if folds else actor


@torch.no_grad()
def _probe(network: nn.Module) -> Tensor:
    """Logits of two tokens."""
    tokens = torch.tensor([[0, 1]], device=next(network.parameters()).device)
    return network(input_ids=tokens, use_cache=False).logits.float()


def _twin(network: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """The same structure in eval mode over other parameters and the same buffers."""
    known: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    known |= {id(weight): nn.Parameter(convert(weight), requires_grad=False) for weight in network.parameters()}
    return copy.deepcopy(network, known).eval()


class PackedLinear(nn.Module):
    """A linear map whose weight lies in the order in which oneDNN multiplies few rows: it is not sorted at every pass.

    Args:
        linear: on a CPU, in one of `PACKED_DTYPES`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, None), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """W·x + b."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _pack(network: nn.Module) -> None:
    """Pack every linear map that no hook watches."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and not (child._forward_hooks or child._forward_pre_hooks):
                setattr(module, name, PackedLinear(child))


@cache
def _can_pack(device: str, dtype: torch.dtype) -> bool:
    """Whether packing is right here: the operators belong to torch's compiler, and may be missing or differ."""
    if device != "cpu" or dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(64, 48).to(dtype)
    states = torch.linspace(-1, 1, 5 * 64, dtype=dtype).view(5, 1, 64)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear)(states), linear(states), rtol=0.02, atol=0.02)
    except (AttributeError, RuntimeError, TypeError):
        return False
