"""Copies of a network's structure over other weights, also of a sharded network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Blueprint:
    """A network's structure without weights, taken before sharding because FSDP's modules are not copyable.

    It is no `nn.Module`, so that a module may hold it beside the network.

    Args:
        network: whole.
    """

    def __init__(self, network: nn.Module) -> None:
        self.structure = twin(network, lambda weight: torch.empty_like(weight, device="meta"))


def twin(network: nn.Module, convert: Callable[[Tensor], Tensor], *, blueprint: Blueprint | None = None) -> nn.Module:
    """Copy a module with converted parameters without gradient; works on sharded modules.

    The copy has the same buffers.

    Args:
        network: to copy.
        convert: from its parameters to the copy's.
        blueprint: of a sharded network, whose parameters are shards: `convert` gathers them, on all processes in turn.
    """
    structure = network if blueprint is None else blueprint.structure
    buffers, weights = dict(network.named_buffers()), dict(network.named_parameters())
    copies: dict[int, Any] = {id(old): buffers[name] for name, old in structure.named_buffers()}
    for name, old in structure.named_parameters():
        copies[id(old)] = nn.Parameter(convert(weights[name]).detach(), requires_grad=False)
    return copy.deepcopy(structure, copies)


def whole(network: nn.Module, blueprint: Blueprint | None) -> nn.Module | None:
    """Return the network, or gather a sharded one into the first process's main memory.

    All processes of a sharded network must call this; those after the first get None.

    Args:
        network: the network.
        blueprint: of a sharded one.
    """
    if blueprint is None:
        return network
    first = torch.distributed.get_rank() == 0
    copied = twin(network, lambda weight: _kept(whole_tensor(weight), first), blueprint=blueprint)
    return copied if first else None


def whole_tensor(weight: Tensor) -> Tensor:
    """Return the tensor without gradient, or gather it from its shards; then all processes must ask."""
    if hasattr(weight, "ds_id"):  # DeepSpeed's ZeRO stage 3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def sharded_as(weight: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor on the weight's device and in the same shards."""
    tensor = tensor.to(weight.device)
    if isinstance(weight, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    return tensor


def _kept(weight: Tensor, first: bool) -> Tensor:
    return weight.cpu() if first else weight.new_empty(0)
