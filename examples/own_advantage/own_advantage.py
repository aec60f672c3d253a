"""An advantage of your own: how many responses of the rollout one beats, whatever the scale of the reward.

    PYTHONPATH=examples/own_advantage lightning-rlhf fit --config ppo \
        --config examples/own_advantage/own_advantage.yaml --model.policy.path runs/sft/model \
        --model.reward.path runs/reward/model --data.train prompts.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_rlhf import AdvantageEstimator
from lightning_rlhf.core import AdvantagesAndReturns, AllSum


@dataclass(frozen=True, kw_only=True)
class WinRate(AdvantageEstimator):
    """Âᵢ = meanⱼ sign(Rᵢ − Rⱼ), R the reward of a response less β·KL: in [−1, 1], mean 0, ties at half a win.

    Ranks are among the responses of one process; `all_sum` is there for baselines that are sums over all of them.
    """

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, all_sum: AllSum
    ) -> AdvantagesAndReturns:
        totals = rewards.sum(1)
        wins = (totals.unsqueeze(1) - totals).sign().mean(1)
        return AdvantagesAndReturns(advantages=wins.unsqueeze(1) * mask, returns=totals.unsqueeze(1) * mask)
