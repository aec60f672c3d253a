"""What some of Lightning's strategies cannot do, or do themselves; said before a network is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor

from lightning_rlhf.models.meta import expect_shards, expect_whole

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule

SHARD_BY_FSDP2 = "shard with ModelParallelStrategy (configs/strategy/fsdp2.yaml)"


def strategy_of(module: LightningModule) -> Strategy | None:
    """The strategy of the module's trainer; None without a trainer."""
    trainer = module._trainer
    return None if trainer is None else trainer.strategy


def check_strategy(module: LightningModule) -> None:
    """Refuse what no stage can train under; where networks are to be sharded, have them built without weights.

    Raises:
        ValueError: DeepSpeed would shard the weights while transformers reads them.
    """
    strategy = strategy_of(module)
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ValueError(
            f"{type(module).__name__} does not train under DeepSpeed's ZeRO stage 3, which shards weights as they are "
            f"made: {SHARD_BY_FSDP2}, or take stage 2"
        )
    if module.device_mesh is None:
        expect_whole()
    else:
        expect_shards()


def check_rl_strategy(module: PPOModule) -> None:
    """Refuse what PPO cannot train under, and hand DeepSpeed the clipping that it does itself.

    Raises:
        ValueError: FSDP1, whose one forward would hold all updates; several backwards a step under DeepSpeed, which
            keeps the last of them alone; compiled blocks under FSDP2, which was never run.
    """
    check_strategy(module)
    strategy, updates = strategy_of(module), module.updates
    if module.compile_networks and module.device_mesh is not None:
        raise ValueError(f"`compile` was not tried under {type(strategy).__name__}: set it to False")
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"PPO does not train under {type(strategy).__name__} (FSDP1), which takes a training step for one forward "
            f"and backward, where PPO makes many: {SHARD_BY_FSDP2}"
        )
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    if updates.microbatch is not None or updates.microbatch_tokens is not None:
        raise ValueError(
            "under DeepSpeed an optimizer step is one backward: leave `updates.microbatch` and "
            f"`updates.microbatch_tokens` out and set a smaller `updates.minibatch`, or {SHARD_BY_FSDP2}"
        )
    strategy.config["gradient_clipping"] = updates.max_grad_norm or 0.0


def gradient_norm(module: LightningModule, measured: Tensor) -> Tensor:
    """Norm of all gradients of the last step before clipping: what was measured, or what DeepSpeed's engine says.

    Args:
        module: whose strategy.
        measured: before the step, from the parameters; DeepSpeed does not leave gradients there.
    """
    strategy = strategy_of(module)
    if not isinstance(strategy, DeepSpeedStrategy):
        return measured
    return torch.as_tensor(strategy.deepspeed_engine.get_global_grad_norm(), device=module.device)
