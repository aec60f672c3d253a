"""Copy of the policy for sampling, made for one rollout and then discarded."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor, nn

from lightning_rlhf.models.adapter import bare_base, fold, is_adapted, is_off
from lightning_rlhf.models.limits import rows_of
from lightning_rlhf.models.quantization import is_quantized, shared
from lightning_rlhf.models.replica import Blueprint, twin, whole_tensor

logger = logging.getLogger(__name__)

PACKED_DTYPES = (torch.float32, torch.bfloat16)
_UNPACKABLE: set[str] = set()
WORTH_PACKING = 8
"""Number of passes from which packing the weights pays off."""


def make_actor(network: nn.Module, dtype: torch.dtype, *, passes: int, blueprint: Blueprint | None = None) -> nn.Module:
    """Copy the network in eval mode and `dtype`; on a CPU the linear maps of an unsharded one are packed.

    An adapter is folded in, or left out where it is off. A quantized network samples from its own weights beside its
    adapter, in the dtype in which it computes.

    Weights that need no change are shared with the network, which stays as it is. Buffers keep their precision: rotary
    frequencies must not be rounded. The weights of a sharded network are gathered, so that all processes must call this
    together; what samples then runs no collective, and each process stops when its own responses have ended.

    Args:
        network: a causal language model, bare or in an adapter.
        dtype: of the weights that sample.
        passes: forward passes to come; packing is worth its while only for some.
        blueprint: of a sharded network.
    """
    if is_quantized(network):
        return shared(network).eval()
    actor = _unpacked(network, dtype, blueprint)
    if blueprint is not None:
        return actor
    kind = type(actor).__qualname__
    if passes < WORTH_PACKING or kind in _UNPACKABLE or not _can_pack(next(actor.parameters()).device.type, dtype):
        return actor
    expected = _probe(actor)
    if torch.equal(expected, expected[..., :1].expand_as(expected)):  # such logits would agree with anything
        return actor
    _pack(actor)
    try:
        if torch.allclose(_probe(actor), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())):
            return actor
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # it reads the weights by itself
        logger.info("the weights of %s stay as they are: it does not work with packed ones", kind)
    _UNPACKABLE.add(kind)
    return _unpacked(network, dtype, None)


def _unpacked(network: nn.Module, dtype: torch.dtype, blueprint: Blueprint | None) -> nn.Module:
    off = is_off(network)
    folds = is_adapted(network) and hasattr(network, "merge_and_unload") and not off
    actor = twin(network, lambda weight: whole_tensor(weight).to(dtype, copy=folds), blueprint=blueprint).eval()
    if off:
        return bare_base(actor)
    return fold(actor) if folds else actor


@torch.no_grad()
def _probe(network: nn.Module) -> Tensor:
    """Compute logits of four tokens across the vocabulary, because the padding token's embedding may be 0."""
    tokens = torch.linspace(0, (rows_of(network) or 2) - 1, 4, device=next(network.parameters()).device).long()
    return network(input_ids=tokens.unsqueeze(0), use_cache=False).logits.float()


class PackedLinear(nn.Module):
    """Linear map with its weight in oneDNN's layout for few rows, so that it is not reordered at every pass.

    Args:
        linear: on a CPU, in one of `PACKED_DTYPES`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, None), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return W·x + b."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _pack(network: nn.Module) -> None:
    """Pack every linear map that has no hook."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and not (child._forward_hooks or child._forward_pre_hooks):
                setattr(module, name, PackedLinear(child))


@cache
def _can_pack(device: str, dtype: torch.dtype) -> bool:
    """Return True if packing is correct on this build: the operators are internal to torch's compiler.

    They may be missing or differ.
    """
    if device != "cpu" or dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(64, 48).to(dtype)
    states = torch.linspace(-1, 1, 5 * 64, dtype=dtype).view(5, 1, 64)
    try:
        with torch.no_grad():
            return torch.allclose(PackedLinear(linear)(states), linear(states), rtol=0.02, atol=0.02)
    except (AttributeError, RuntimeError, TypeError):
        return False
