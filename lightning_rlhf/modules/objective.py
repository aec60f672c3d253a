"""The loss of one minibatch: surrogate + value loss − γ·log π(text) (Ouyang et al. 2022, eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core import ActionLevel, Reduction, Surrogate, ValueLoss, importance_ratio, k2, k3, next_token_loss
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.rollout import Collector
from lightning_rlhf.types import Experience, Rollout, TextBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What an update minimises, as numerators: the caller knows the denominators of the whole step.

    Attributes:
        policy: π_θ.
        collector: knows V and the temperature.
        level: what an action is.
        surrogate: of the policy.
        value_loss: of V.
        reduction: from per-action losses to a number.
    """

    policy: PolicyModel
    collector: Collector
    level: ActionLevel
    surrogate: Surrogate
    value_loss: ValueLoss
    reduction: Reduction

    def actions(self, piece: Experience, tally: Tally) -> Tensor:
        """Surrogate and value loss over the actions of some rows, scalar."""
        old, mask = piece.rollout, piece.mask
        log_ratio = self.log_ratio(old)
        action = self.surrogate(log_ratio, piece.advantages)
        total, stats = self.reduction.total(action.loss, mask), {"loss/policy_avg": action.loss} | action.stats
        if self.collector.value is not None:
            values = self.collector.values(old.tokens, old.attention, old.response)
            values, before = (self.level.state_value(v, old.response) for v in (values, old.values))
            value = self.value_loss(values, before, piece.returns)
            total = total + self.reduction.total(value.loss, mask)
            stats |= {"loss/value_avg": value.loss} | value.stats
        ratio = importance_ratio(log_ratio.detach())
        stats |= {"policy/approxkl_avg": k2(log_ratio), "val/ratio": ratio, "val/ratio_square": ratio.square()}
        for name, per_action in stats.items():
            tally.add(name, per_action, mask)
        return total

    def log_ratio(self, old: Rollout) -> Tensor:
        """log π_θ(a|s) − log π_old(a|s) of each action, (B, T), nats."""
        width, temperature = old.response.shape[1], self.collector.generation.temperature
        logprobs = self.policy(old.tokens, old.attention, width=width, temperature=temperature).logprobs
        return self.level.log_ratio(logprobs, old.logprobs, old.response)

    def text(self, text: TextBatch, tally: Tally, *, count: Tensor) -> Tensor:
        """−Σ log π_θ(token) / count, nats per token: the γ term before its γ."""
        logprobs = self.policy(text.tokens, text.mask, width=text.tokens.shape[1] - 1).logprobs
        tally.add("ptx/loss", -logprobs, text.target[:, 1:])
        return next_token_loss(logprobs, text.target, count=count)

    @torch.no_grad()
    def kl_old(self, piece: Experience, tally: Tally) -> None:
        """Adds KL(π_old‖π_θ) per action, by k3 at the samples of π_old (PPO §4)."""
        tally.add("policy/kl_old", k3(-self.log_ratio(piece.rollout)), piece.mask)
