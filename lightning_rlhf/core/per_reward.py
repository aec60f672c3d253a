"""Advantages of several rewards, each estimated alone and then summed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rlhf.core.advantage import AdvantageEstimator, AdvantagesAndReturns
from lightning_rlhf.core.group_advantage import BatchStd, GroupAdvantage, GroupScale
from lightning_rlhf.core.groups import group_sum
from lightning_rlhf.core.masked import AllSum


@dataclass(frozen=True, kw_only=True)
class PerReward(AdvantageEstimator):
    """Advantages Σ_i w_i·Â_i of the parts of a `WeightedReward`, each estimated by itself (GDPO; 2601.05242).

    Â of a sum lets the part with the larger spread decide; here each part counts by its weight alone. A response that a
    part has no score for is left out of that part's estimate. With `GroupAdvantage` inside and `BatchStd` as unit it is
    GDPO. What shaping rules add to the score is one more part, of weight 1. The KL must be in the loss, or β 0.
    """

    estimator: AdvantageEstimator = field(default_factory=GroupAdvantage)
    """Estimator of each part's advantages; it must need no value network and not adapt."""
    scale: GroupScale = field(default_factory=BatchStd)
    """Unit of the sum over a response."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator.needs_value or self.estimator.state():
            named = type(self.estimator).__name__
            raise ValueError(
                f"`PerReward` has neither a value network nor a memory for each reward, and {named} needs one: take "
                "GroupAdvantage, or BanditAdvantage with a baseline such as LeaveOneOut"
            )

    @property
    def needs_group(self) -> bool:
        """True if the inner estimator compares several responses to one prompt."""
        return self.estimator.needs_group

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Estimate the advantages of a reward without parts."""
        credit = self.estimator(rewards, values, mask, groups=groups, all_sum=all_sum)
        return self._scaled(credit, mask, groups, all_sum)

    def summed(
        self, parts: Tensor, weights: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Estimate the advantages of each part and sum them.

        Args:
            parts: rewards of the actions, (n, B, T), NaN in the rows that a part has no score for.
            weights: w, (n,).
            mask: actions that count, (B, T), bool.
            groups: which prompt each row answers, (B,), int64.
            all_sum: sums a tensor over processes.
        """
        total = torch.zeros_like(parts[0])
        for weight, rewards in zip(weights, parts, strict=True):
            scored = ~rewards.isnan().any(1)
            if self.needs_group:
                scored = scored & (group_sum(scored.long(), groups) > 1)  # one alone has nothing to be compared with
            advantages = self.estimator(
                rewards[scored],
                torch.zeros_like(rewards[scored]),
                mask[scored],
                groups=groups[scored],
                all_sum=all_sum,
            ).advantages
            total[scored] = total[scored] + weight * advantages
        return self._scaled(AdvantagesAndReturns(total, torch.zeros_like(total)), mask, groups, all_sum)

    def _scaled(
        self, credit: AdvantagesAndReturns, mask: Tensor, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        """Divide by the unit of the responses' mean advantages."""
        of_responses = credit.advantages.sum(1) / mask.sum(1).clamp(min=1)
        unit = self.scale(of_responses, groups, all_sum)
        return credit._replace(advantages=credit.advantages / unit.unsqueeze(1))
