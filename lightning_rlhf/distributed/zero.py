"""DeepSpeed's engine, which owns the gradients and at ZeRO stage 3 the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy


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
    strategy.config["gradient_clipping"] = max_grad_norm or 0.0
    if strategy.zero_stage_3:  # weights are fetched ahead in the order of the step before, and no two rollouts have one
        strategy.config["zero_optimization"]["stage3_prefetch_bucket_size"] = 0


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
