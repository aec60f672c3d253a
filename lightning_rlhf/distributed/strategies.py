"""Particulars of Lightning's strategies; unsupported ones raise before a network is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from lightning_rlhf.distributed.sharding import is_sharded
from lightning_rlhf.distributed.zero import open_backward, prepare_engine, strategy_of

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
