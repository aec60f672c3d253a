"""The one place that asks Lightning's strategy whether each process holds only a part of every weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models.meta import settle


def shard_networks(module: LightningModule, networks: Iterable[nn.Module | None]) -> None:
    """Shard policies and scalar models under `ModelParallelStrategy`, which leaves that to the module.

    Call it at the end of `configure_model`. Networks of other kinds stay whole on each process.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    mesh = module.device_mesh
    if mesh is None:
        return
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy was asked for tensor parallelism over {size} devices, which is not supported: set "
            f"its tensor_parallel_size to 1 and its data_parallel_size to {mesh.size()}"
        )
    for network in networks:
        if isinstance(network, PolicyModel | ScalarModel):
            network.shard(mesh["data_parallel"])
    settle()


def most_passes(module: LightningModule, count: int) -> int:
    """The most passes any process needs, where networks are sharded and every pass needs all of them; else `count`."""
    if module.device_mesh is None:
        return count
    return int(module.trainer.strategy.reduce(torch.tensor(count, device=module.device), reduce_op="max"))
