"""The same structure over other weights: how a network is copied, also one of which this process has only shards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Blueprint:
    """A network's structure without its weights, taken before the network is sharded: FSDP's modules are not copyable.

    It is no `nn.Module`, so that a module may hold it beside the network.

    Args:
        network: whole.
    """

    def __init__(self, network: nn.Module) -> None:
        self.structure = twin(network, lambda weight: torch.empty_like(weight, device="meta"))


def twin(network: nn.Module, convert: Callable[[Tensor], Tensor], *, blueprint: Blueprint | None = None) -> nn.Module:
    """The same structure over other parameters, without gradient, and the same buffers.

    Args:
        network: to copy.
        convert: from its parameters to the twin's.
        blueprint: of a sharded network, whose parameters are shards: `convert` gathers them, on all processes in turn.
    """
    structure = network if blueprint is None else blueprint.structure
    buffers, weights = dict(network.named_buffers()), dict(network.named_parameters())
    known: dict[int, Any] = {id(old): buffers[name] for name, old in structure.named_buffers()}
    for name, old in structure.named_parameters():
        known[id(old)] = nn.Parameter(convert(weights[name]).detach(), requires_grad=False)
    return copy.deepcopy(structure, known)


def whole(network: nn.Module, blueprint: Blueprint | None) -> nn.Module | None:
    """The network itself where it is whole; of a sharded one a whole copy in the first process's main memory.

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
    """The tensor itself, or that of which it is a shard: then all processes must ask. Without its gradient."""
    if hasattr(weight, "ds_id"):  # DeepSpeed's ZeRO stage 3
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _kept(weight: Tensor, first: bool) -> Tensor:
    return weight.cpu() if first else weight.new_empty(0)
