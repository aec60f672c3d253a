"""Norms of the two gradients of PPO-ptx, from responses and from pretraining texts (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_rlhf.core import next_token_loss
from lightning_rlhf.rollout.updates import split_text
from lightning_rlhf.types import PPOBatch, TextBatch

logger = logging.getLogger(__name__)

NORMS = ("policy/rl_grad_norm", "ptx/grad_norm", "ptx/grad_norm_ratio")


class GradientNorms(Callback):
    """Measures the two gradients of PPO-ptx at the first optimizer step of a rollout and changes neither.

    Logs `policy/rl_grad_norm`, the norm of the policy's gradient without the texts; `ptx/grad_norm`, that of γ times
    the pretraining loss; and `ptx/grad_norm_ratio`, the second over the first. A measurement takes one more backward
    over the texts of a minibatch, and the memory of two more gradients. Without texts (γ = 0) and under DeepSpeed,
    whose engine does not expose the gradients, nothing is measured, and a warning is logged.

    Args:
        every: rollouts from one measurement to the next.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"`every` counts rollouts and must be at least 1: got {every}")
        self.every = every
        self._texts: TextBatch | None = None
        self._measures = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there is nothing to measure."""
        why = None
        if not getattr(getattr(pl_module, "algorithm", None), "ptx_coef", 0.0):
            why = f"this {type(pl_module).__name__} has no `algorithm.ptx_coef` above 0"
        elif isinstance(trainer.strategy, DeepSpeedStrategy):
            why = "DeepSpeed's engine keeps the gradients to itself"
        self._measures = why is None
        if why is not None and trainer.is_global_zero:
            logger.warning("GradientNorms measures nothing: %s", why)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PPOBatch, batch_idx: int) -> None:
        """Keep the texts of a rollout that is measured and reset the norms of an earlier one."""
        if not self._measures:
            return
        for metric in trainer._results.values():  # type: ignore[union-attr]
            if metric.meta.name in NORMS:
                metric.reset()  # or Lightning would write it again
        self._texts = batch.get("pretrain") if pl_module.iteration % self.every == 0 else None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Log the norms before clipping (unscaled under fp16) and restore the step's gradients."""
        texts, self._texts = self._texts, None
        step = {p: p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if texts is None or not step:  # NonFiniteGuard took them
            return
        policy = [p for p in pl_module.policy.parameters() if p in step]
        copies = trainer.world_size > 1  # replicas may write the next gradient where the last one is
        whole = [step[p].clone() if copies else step[p] for p in policy]
        ptx = _gradient(trainer, pl_module, optimizer, self._share(pl_module, texts))
        parts = [ptx[p] if p in ptx else torch.zeros_like(p) for p in policy]
        for p, gradient in (step | dict(zip(policy, whole, strict=True))).items():
            p.grad = gradient
        texts_norm = _norm(parts)
        rest_norm = _norm([part.sub_(all_of_it) for part, all_of_it in zip(parts, whole, strict=True)])
        norms = dict(zip(NORMS, (rest_norm, texts_norm, texts_norm / rest_norm), strict=True))
        pl_module.log_dict(norms, batch_size=1)

    @staticmethod
    def _share(pl_module: Any, texts: TextBatch) -> list[TextBatch]:
        """The texts of the first minibatch, in pieces that fit in memory."""
        updates = pl_module.updates
        count = updates.steps(len(pl_module.outcome.rollout)) // updates.epochs
        pieces: list[TextBatch] = updates.text_microbatches(split_text(texts, count)[0], pl_module.collector.agree)
        return pieces


def _gradient(
    trainer: Trainer, pl_module: Any, optimizer: Optimizer, pieces: list[TextBatch]
) -> dict[torch.nn.Parameter, Tensor]:
    """Compute ∇ of −γ·log π(texts) per token of all processes; overwrites the parameters' gradients."""
    count = pl_module.ranks.sum(torch.stack([piece.target.sum() for piece in pieces]).sum()).clamp(min=1)
    optimizer.zero_grad()
    with torch.enable_grad(), pl_module.optimizers().toggle_model(sync_grad=False):  # the value network has no part
        for piece in pieces:
            logprobs = pl_module.policy.text_logprobs(piece)
            loss = pl_module.algorithm.ptx_coef * next_token_loss(logprobs, piece.target, count=count)
            pl_module.manual_backward(loss * trainer.world_size)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else scaler.get_scale()
    gradients = {p: p.grad.div_(scale) for p in pl_module.policy.parameters() if p.grad is not None}
    mean = trainer.strategy.reduce  # shards were reduced as they were made
    return {p: g if isinstance(g, DTensor) else mean(g, reduce_op="mean") for p, g in gradients.items()}


def _norm(gradients: list[Tensor]) -> Tensor:
    """Global norm of gradients that may be sharded."""
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
