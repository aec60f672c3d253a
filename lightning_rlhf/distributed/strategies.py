"""Particulars of Lightning's strategies: sharding, DeepSpeed's engine and refusals before a network is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models.meta import expect_shards, expect_whole, settle
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.sharding import partition


def strategy_of(module: LightningModule) -> Strategy | None:
    """Return the strategy of the module's trainer; returns None without a trainer."""
    trainer = module._trainer
    return None if trainer is None else trainer.strategy


def stage_3_of(module: LightningModule) -> DeepSpeedStrategy | None:
    """Return the module's strategy if it is DeepSpeed at ZeRO stage 3.

    Each process then holds a part of every weight.
    """
    strategy = strategy_of(module)
    return strategy if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 else None


@contextmanager
def modules_left_whole() -> Iterator[None]:
    """Context in which ZeRO stage 3 does not shard the weights of new modules."""
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        shutdown_init_context()  # an engine made inside has taken it up, and twice would be once for ever
        restore_init_context()


def prepare_engine(strategy: DeepSpeedStrategy, max_grad_norm: float | None) -> None:
    """Configure the engine for PPO.

    Args:
        strategy: before its engine is made.
        max_grad_norm: to which the engine clips, since only it sees whole gradients.
    """
    config: Any = strategy.config
    config["gradient_clipping"] = max_grad_norm or 0.0
    if strategy.zero_stage_3:  # weights are fetched ahead in the order of the step before, and no two rollouts have one
        config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


def open_backward(strategy: DeepSpeedStrategy, *, last: bool) -> None:
    """Make the next backward add to the gradients of those before it.

    The engine closes a backward when its next forward begins. It takes a whole training step for a forward, so that
    without this a second backward would replace the gradients of the first, or be left out.

    Args:
        strategy: whose engine.
        last: whether the optimizer steps next, so that gradients are made ready for it.
    """
    engine = strategy.deepspeed_engine
    engine.set_gradient_accumulation_boundary(last)
    engine.optimizer.clear_backward_seen_flag()


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
        ValueError: the strategy asks for tensor parallelism, or a network is quantized.
    """
    zero, mesh = stage_3_of(module), module.device_mesh
    sharded = [network for network in networks if isinstance(network, PolicyModel | ScalarModel)]
    strategy = strategy_of(module)
    if isinstance(strategy, SHARDING) and any(is_quantized(network) for network in sharded):
        raise ValueError(
            f"{type(strategy).__name__} cuts or converts weights, and quantized ones cannot be: take the strategy ddp, "
            "under which each process holds them all, or leave `quantization` out"
        )
    if zero is not None:
        for network in sharded:
            network.keep_shards(partition(network, zero.config or {}))
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


SHARDING = (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy)
SHARD_BY_FSDP2 = "shard with ModelParallelStrategy (configs/strategy/fsdp2.yaml)"


def check_rl_strategy(module: LightningModule, *, compiles: bool, max_grad_norm: float | None) -> None:
    """Raise if PPO cannot train under the strategy, and configure DeepSpeed's engine.

    Args:
        module: whose trainer's strategy.
        compiles: whether the networks' blocks are to be compiled.
        max_grad_norm: norm to which gradients are clipped; None does not clip.

    Raises:
        ValueError: FSDP1, whose one forward would hold all updates; compiled blocks that are sharded, which was never
            run.
    """
    strategy = strategy_of(module)
    if compiles and is_sharded(module):
        raise ValueError(f"`compile` was not tried under {type(strategy).__name__}: set it to False")
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"PPO does not train under {type(strategy).__name__} (FSDP1), which takes a training step for one forward "
            f"and backward, where PPO makes many: {SHARD_BY_FSDP2}"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        prepare_engine(strategy, max_grad_norm)


@contextmanager
def one_backward(module: LightningModule, optimizer: LightningOptimizer, *, last: bool) -> Iterator[None]:
    """Context of one of several forward and backward passes whose gradients add up in a step.

    Args:
        module: whose strategy.
        optimizer: that steps afterwards.
        last: whether it steps next; where replicas can, they exchange gradients only then.
    """
    strategy = strategy_of(module)
    if isinstance(strategy, DeepSpeedStrategy):
        open_backward(strategy, last=last)
        yield
        return
    with optimizer.toggle_model(sync_grad=last):
        yield


def gradient_norm(module: LightningModule, measured: Tensor) -> Tensor:
    """Return the norm of all gradients of the last step before clipping, from DeepSpeed's engine if it has it.

    Args:
        module: whose strategy.
        measured: before the step, from the parameters; DeepSpeed does not leave gradients there.
    """
    strategy = strategy_of(module)
    if not isinstance(strategy, DeepSpeedStrategy):
        return measured
    return torch.as_tensor(strategy.deepspeed_engine.get_global_grad_norm(), device=module.device)
