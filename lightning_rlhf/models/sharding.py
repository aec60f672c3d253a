"""Sharding with torch's FSDP2 of weights, gradients and optimizer state."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_rlhf.models.cache import bare
from lightning_rlhf.models.meta import fill, taken
from lightning_rlhf.models.replica import Blueprint


def shard(model: nn.Module, mesh: DeviceMesh) -> Blueprint:
    """Shard a model over the processes of a mesh: each transformer block by itself, all other weights together.

    Each process then reads its shard of the weights that were left in their files.

    The model must be what is called, for its weights are whole only inside its own forward; outside they are shards.

    Args:
        model: holds a transformers model as `network`.
        mesh: one-dimensional.

    Returns:
        what a whole copy of `network` is made from.
    """
    weights = taken(model.network)
    blueprint = Blueprint(model.network)
    for block in blocks(model.network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # or weights gathered for a forward would go stale
    fill(model.network, weights)
    return blueprint


def blocks(network: nn.Module) -> list[nn.Module]:
    """List the modules that transformers says must not be split; empty if it names none."""
    names = set(getattr(bare(network), "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]
