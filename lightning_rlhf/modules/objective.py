"""The loss of one minibatch: surrogate + β·KL in the loss + value loss − γ·log π(text) (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_rlhf.core import (
    ActionLevel,
    Reduction,
    ReferenceKL,
    Surrogate,
    ValueLoss,
    importance_ratio,
    k2,
    k3,
    next_token_loss,
)
from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.rollout import Collector
from lightning_rlhf.types import Experience, PPOBatch, TextBatch

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an update minimises, as numerators: the caller knows the denominators of the whole step.

    Attributes:
        policy: π_θ.
        collector: knows V and the temperature.
        level: what an action is.
        surrogate: of the policy.
        kl_term: the KL to the reference, where it is in the loss.
        kl_coef: β.
        value_loss: of V.
        reduction: from per-action losses to a number.
    """

    policy: PolicyModel
    collector: Collector
    level: ActionLevel
    surrogate: Surrogate
    kl_term: ReferenceKL
    kl_coef: float
    value_loss: ValueLoss
    reduction: Reduction

    @classmethod
    def of(cls, module: PPOModule) -> Objective:
        """The loss with the module's surrogate and β of today."""
        return cls(
            policy=module.policy,
            collector=module.collector,
            level=module.level,
            surrogate=module.surrogate,
            kl_term=module.kl_term,
            kl_coef=module.kl.coef,
            value_loss=module.value_loss,
            reduction=module.reduction,
        )

    def of_piece(
        self, piece: Experience | TextBatch, tally: Tally, *, actions: Tensor, words: Tensor, ptx_coef: float
    ) -> Tensor:
        """Share of the step's loss that a piece of the rollout, or of the pretraining texts, has, scalar.

        Args:
            piece: what is passed through the networks.
            tally: takes the metrics.
            actions: count of the reduction in the whole step, of all processes.
            words: tokens of text that count in the whole step, of all processes.
            ptx_coef: γ.
        """
        if isinstance(piece, TextBatch):
            return ptx_coef * self.text(piece, tally, count=words)
        return self.actions(piece, tally) / actions

    def actions(self, piece: Experience, tally: Tally) -> Tensor:
        """Surrogate, KL in the loss and value loss over the actions of some rows, scalar."""
        old, mask = piece.rollout, piece.mask
        logprobs = self.collector.logprobs(old) if old.live is None else old.live
        log_ratio = self.level.log_ratio(logprobs, old.logprobs, old.response)
        action = self.surrogate(log_ratio, piece.advantages)
        weights = self.surrogate.weights(self.level.total(old.logprobs - old.sampler_logprobs, old.response))
        kl = self.kl_coef * self.kl_term.in_loss(logprobs, old.ref_logprobs, old.response, self.level)
        total = self.reduction.total(weights * action.loss + kl, mask)
        stats = {"loss/policy_avg": weights * action.loss, "loss/kl_avg": kl} | action.stats
        if self.collector.value is not None:
            values = self.collector.values(old)
            values, before = (self.level.state_value(v, old.response) for v in (values, old.values))
            value = self.value_loss(values, before, piece.returns)
            total = total + self.reduction.total(value.loss, mask)
            stats |= {"loss/value_avg": value.loss} | value.stats
        ratio = importance_ratio(log_ratio.detach())
        stats |= {"policy/approxkl_avg": k2(log_ratio), "val/ratio": ratio, "val/ratio_square": ratio.square()}
        for name, per_action in stats.items():
            tally.add(name, per_action, mask)
        return total

    def text(self, text: TextBatch, tally: Tally, *, count: Tensor) -> Tensor:
        """−Σ log π_θ(token) / count, nats per token: the γ term before its γ."""
        wanted = text.target[:, 1:]
        logprobs = self.policy(text.tokens, text.mask, width=wanted.shape[1], wanted=wanted)
        tally.add("ptx/loss", -logprobs, wanted)
        return next_token_loss(logprobs, text.target, count=count)

    @torch.no_grad()
    def kl_old(self, piece: Experience, tally: Tally) -> None:
        """Adds KL(π_old‖π_θ) per action, by k3 at the samples of π_old (PPO §4)."""
        old = piece.rollout
        log_ratio = self.level.log_ratio(self.collector.logprobs(old), old.logprobs, old.response)
        tally.add("policy/kl_old", k3(-log_ratio), piece.mask)


def pretraining_of(batch: PPOBatch, ptx_coef: float) -> TextBatch | None:
    """The pretraining texts of a batch; None where γ is 0.

    Raises:
        ValueError: there are none, or γ is no number.
    """
    check_not_negative(ptx_coef=ptx_coef)
    if ptx_coef == 0:
        return None
    if "pretrain" not in batch:
        raise ValueError(
            f"`ptx_coef` is {ptx_coef}, but the data serves no pretraining texts: set the data's `pretrain`, "
            "or `ptx_coef` to 0"
        )
    return batch["pretrain"]
