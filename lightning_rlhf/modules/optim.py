"""Optimizers and learning-rate schedules, with checks before the first step."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_rlhf.core.schedule import Schedule
from lightning_rlhf.core.settings import Difference
from lightning_rlhf.models.replica import whole_tensor

FUSED = ("cpu", "cuda")
"""Devices on which torch has fused optimizers."""
ENDLESS = 10**9
"""Number of steps assumed for a run without end."""


def ends_after(module: LightningModule, steps: int) -> bool:
    """Return True if the rollout of this training step is the last of the run.

    Args:
        module: in its training step.
        steps: optimizer steps of this rollout.
    """
    trainer = module._trainer
    if trainer is None:
        return True
    epochs = trainer.max_epochs or 0
    of_epochs = epochs > 0 and trainer.fit_loop.total_batch_idx + 1 >= trainer.num_training_batches * epochs
    return of_epochs or 0 < trainer.max_steps <= trainer.global_step + steps


logger = logging.getLogger(__name__)


def scheduled(optimizer: Optimizer, schedule: Schedule, total: Callable[[], int]) -> dict[str, Any]:
    """Return for `configure_optimizers` the optimizer and a schedule that steps once per step of `total`.

    Args:
        optimizer: at its peak learning rates.
        schedule: the factor on them.
        total: steps of the whole run, asked each time because a trainer may learn it late.
    """
    _fuse(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: schedule.factor(step, total()))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _fuse(optimizer: Optimizer) -> None:
    """Turn on the fused kernel of Adam and AdamW if the user chose none and the devices support it.

    Because it is set on the groups, `_step_supports_amp_scaling` stays off, so that fp16 gradients can still be
    clipped.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        free = not (group["fused"] is not None or group["foreach"] or group["capturable"] or group["differentiable"])
        if free and all(p.device.type in FUSED and p.is_floating_point() for p in group["params"]):
            group["fused"], group["foreach"] = True, False


def retune(module: LightningModule) -> None:
    """Apply today's settings to a resumed optimizer and its schedule. Otherwise the checkpoint's would stay."""
    optimizer = module.trainer.optimizers[0]
    scheduler: Any = module.trainer.lr_scheduler_configs[0].scheduler
    built: Any = module.configure_optimizers()
    fresh = built["optimizer"]
    for live, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        live.update({name: value for name, value in new.items() if name != "params"})
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def training_steps(module: LightningModule) -> int:
    """Number of optimizer steps of the run under automatic optimization; very large for an endless run.

    A resumed run must not ask for its data before Lightning has the checkpoint's position in them, which it would lose;
    the schedule's first value, for which it is asked by then, comes from the checkpoint.
    """
    trainer = module.trainer
    if trainer.ckpt_path and trainer.fit_loop._combined_loader is None:
        return ENDLESS
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else ENDLESS


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that require gradients.

    Raises:
        ValueError: there is none.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: was it frozen before it came here?")
    return parameters


def chosen_optimizer(
    optimizer: OptimizerCallable | None, lr: float | None, *, default: float, eps: float = 1e-8
) -> OptimizerCallable:
    """Return the user's optimizer, or AdamW without weight decay.

    Args:
        optimizer: that was chosen, or None.
        lr: learning rate that was chosen for AdamW, or None.
        default: learning rate if neither was.
        eps: of AdamW.

    Raises:
        ValueError: both were chosen.
    """
    if optimizer is None:
        return partial(torch.optim.AdamW, lr=default if lr is None else lr, eps=eps, weight_decay=0.0)
    if lr is not None:
        raise ValueError(f"`lr`={lr} is of the default optimizer: give it to `optimizer` instead, or leave that out")
    rate = inspect.signature(optimizer).parameters.get("lr") if inspect.isclass(optimizer) else None
    if rate is not None and rate.default is not inspect.Parameter.empty:
        logger.warning(
            "`optimizer`=%s trains at its own default learning rate, %g: give partial(%s, lr=...), or `lr` alone",
            *(optimizer.__name__, rate.default, optimizer.__name__),
        )
    return optimizer


def clip_gradients(module: LightningModule, optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip all gradients to a total norm of `max_norm` and return their norm before it.

    Call it in `on_before_optimizer_step`, where fp16 gradients are unscaled.

    Args:
        module: whose strategy clips.
        optimizer: whose parameters.
        max_norm: None measures only.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        module.clip_gradients(optimizer, gradient_clip_val=max_norm, gradient_clip_algorithm="norm")
    return norm.detach()


def groups_of(policy: nn.Module, value: nn.Module | None, *, value_lr: float | None) -> list[dict[str, Any]]:
    """List a parameter group for each trained network, the policy first.

    Args:
        policy: π_θ.
        value: V_θ, or None.
        value_lr: its peak learning rate; None is the policy's.
    """
    groups: list[dict[str, Any]] = [{"params": trainable(policy)}]
    if value is not None:
        own = {} if value_lr is None else {"lr": value_lr}
        groups.append({"params": trainable(value)} | own)
    return groups


def learning_rate(module: LightningModule) -> float:
    """Return today's learning rate of the first parameter group, the policy's."""
    optimizer: Any = module.optimizers()
    return optimizer.param_groups[0]["lr"]


def rollouts_of(module: LightningModule) -> int:
    """Number of rollouts of the run under manual optimization, where `max_steps` counts optimizer steps."""
    trainer = module.trainer
    done, steps = trainer.fit_loop.total_batch_idx + 1, trainer.global_step
    limits: list[float] = [ENDLESS]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.num_training_batches * trainer.max_epochs)
    if trainer.max_steps > 0 and steps > 0:
        limits.append(math.ceil(trainer.max_steps * done / steps))
    return int(min(limits))


logger = logging.getLogger(__name__)


def picklable(build: OptimizerCallable) -> OptimizerCallable:
    """Return the optimizer's class with its arguments, instead of this library's default lambda."""
    if not getattr(build, "__module__", "").startswith("lightning_rlhf.") or isinstance(build, partial):
        return build
    example = build([nn.Parameter(torch.zeros(1))])
    parameters = inspect.signature(type(example)).parameters
    return partial(type(example), **{name: value for name, value in example.defaults.items() if name in parameters})


def refuse_trainer_settings(module: LightningModule) -> None:
    """Raise if the trainer clips or accumulates gradients for a module that does so itself.

    Raises:
        ValueError: the trainer clips or accumulates gradients.
    """
    trainer = module.trainer
    instead = {
        "gradient_clip_val": "`updates.max_grad_norm` (--model.updates.max_grad_norm), 1.0 by default",
        "accumulate_grad_batches": "`batch_size` of the data and `updates.microbatch_tokens`, which bounds the memory",
    }
    if trainer.state.fn != "fit" or module.automatic_optimization:
        return
    for name, setting in instead.items():
        value = getattr(trainer, name)
        if value not in (None, 0, 1) or (name == "gradient_clip_val" and value):
            raise ValueError(f"`trainer.{name}`={value} is not of PPO, whose step is a rollout: set {setting}")


def refuse_finder(module: LightningModule) -> None:
    """Raise if Lightning would search for a learning rate: it sets an attribute that no module reads.

    Raises:
        ValueError: the trainer has a `LearningRateFinder`, as a callback or through its Tuner.
    """
    trainer: Any = module._trainer
    if trainer is not None and any(isinstance(callback, LearningRateFinder) for callback in trainer.callbacks):
        raise ValueError(
            "LearningRateFinder cannot set this module's learning rate, which is its optimizer's: leave it out, and "
            "compare short runs with other values of `optimizer` (--model.optimizer.lr)"
        )


def begin_training(module: LightningModule, changed: list[Difference]) -> None:
    """Apply today's settings to a resumed optimizer and warn of weights too coarse for the learning rate.

    Args:
        module: about to train, in `on_train_start`.
        changed: settings that the checkpoint has otherwise.
    """
    if changed:
        retune(module)
    if not isinstance(module.trainer.strategy, DeepSpeedStrategy):  # whose optimizer keeps float32 weights of its own
        for group in module.trainer.optimizers[0].param_groups:
            _warn_of_coarse_weights(group)


def _warn_of_coarse_weights(group: dict[str, Any]) -> None:
    """Warn if most half-precision weights are further from their neighbors than twice the learning rate.

    Because an update of Adam is about as large as the learning rate, and one below half of that distance rounds away.
    """
    halves = [p for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
    if not halves:
        return
    rate = group["initial_lr"]
    shards = [getattr(p, "_local_tensor", p).detach().flatten()[:10_000] for p in halves]
    spacing = torch.cat(shards).abs().float() * torch.finfo(halves[0].dtype).eps
    lost = float((spacing > 2 * rate).float().mean()) if len(spacing) else 0.0
    if lost > 0.5:
        logger.warning(
            "%.0f %% of the %s weights are too coarse for steps of about %g, the learning rate, which round away: most "
            "of the model will not train; take `trainer.precision: bf16-mixed`, or a larger learning rate",
            100 * lost,
            str(halves[0].dtype).removeprefix("torch."),
            rate,
        )
