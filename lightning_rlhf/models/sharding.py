"""Sharding of weights, gradients and optimizer state: torch's FSDP2 and DeepSpeed's ZeRO stage 3."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_rlhf.models.cache import bare
from lightning_rlhf.models.meta import fill, taken
from lightning_rlhf.models.replica import Blueprint


def shard(model: Any, mesh: DeviceMesh) -> Blueprint:
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


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Half precisions of a DeepSpeed config and the dtype in which its engine then stores weights."""


def partition(model: Any, config: dict[str, Any]) -> Blueprint:
    """Shard every weight over the processes, in the precision of the config.

    Weights are trained by the strategy's engine, which gathers those of its module; a model without a trained weight is
    no part of it and gets an engine of its own. Either way all processes must then call the model together.

    Args:
        model: whole; holds a transformers model as `network`.
        config: of DeepSpeed.

    Returns:
        what a whole copy of `network` is made from.
    """
    import deepspeed

    blueprint = Blueprint(model.network)
    if any(weight.requires_grad for weight in model.parameters()):
        for name, dtype in HALF.items():
            if config.get(name, {}).get("enabled"):
                for weight in model.parameters():
                    weight.data = weight.data.to(dtype)
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    else:
        deepspeed.initialize(model=model, config=_frozen(model, config), dist_init_required=False)
    return blueprint


def _frozen(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config for a model that is not trained, in the model's precision."""
    dtype = next(model.parameters()).dtype
    half = {name: {"enabled": True} for name, kind in HALF.items() if kind is dtype}
    zero = {"zero_optimization": copy.deepcopy(config["zero_optimization"])}
    return zero | half | {"train_micro_batch_size_per_gpu": 1}
