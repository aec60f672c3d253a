"""Sharding of weights as Lightning's strategy asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.distributed.zero import modules_left_whole, stage_3_of, strategy_of
from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models.meta import expect_shards, expect_whole, settle
from lightning_rlhf.models.zero import partition

Module = TypeVar("Module", bound=LightningModule)


def built_whole(configure_model: Callable[[Module], None]) -> Callable[[Module], None]:
    """Decorate a `configure_model` so that only `shard_networks` shards its networks.

    Until then weights are whole under ZeRO-3, as transformers' loading needs them, and absent under FSDP2.
    """

    @wraps(configure_model)
    def configured(module: Module) -> None:
        if module.device_mesh is not None:
            expect_shards()
        try:
            with nullcontext() if stage_3_of(module) is None else modules_left_whole():
                configure_model(module)
        finally:
            expect_whole()

    return configured


def shard_networks(module: LightningModule, networks: Iterable[nn.Module | None]) -> None:
    """Shard policies and scalar models under strategies that leave that to the module: FSDP2, and DeepSpeed's ZeRO-3.

    Call it at the end of `configure_model`. Networks of other kinds stay whole on each process.

    Raises:
        ValueError: the strategy asks for tensor parallelism.
    """
    zero, mesh = stage_3_of(module), module.device_mesh
    sharded = [network for network in networks if isinstance(network, PolicyModel | ScalarModel)]
    if zero is not None:
        for network in sharded:
            network.keep_shards(partition(network, zero.config))
        module.to(zero.root_device)  # the engine moves nothing of a module whose weights are shards
    if mesh is None:
        return
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"ModelParallelStrategy was asked for tensor parallelism over {size} devices, which is not supported: set "
            f"its tensor_parallel_size to 1 and its data_parallel_size to {mesh.size()}"
        )
    for network in sharded:
        network.shard(mesh["data_parallel"])
    settle()


def is_sharded(module: LightningModule) -> bool:
    """Return True if each process holds only a shard of every weight, so that every pass needs all processes."""
    return module.device_mesh is not None or stage_3_of(module) is not None


def most_passes(module: LightningModule, count: int) -> int:
    """Return the most passes that any process needs if every pass needs all; otherwise `count`.

    Every pass needs all processes if weights are sharded, and under DeepSpeed, whose every backward exchanges
    gradients.
    """
    if not is_sharded(module) and not isinstance(strategy_of(module), DeepSpeedStrategy):
        return count
    return Ranks(module).largest(count)
