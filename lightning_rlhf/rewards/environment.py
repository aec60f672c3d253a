"""Reward that an environment gave during an episode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_rlhf.rewards.reward import Reward
from lightning_rlhf.types import Rollout, Row


class EnvironmentReward(Reward):
    """Sum of what the environment of each episode gave, at its turns and its end.

    It needs `PPOModule.environment`. Another reward may score episodes instead; one of text reads their last turn.
    """

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the sums, (B,), reward units.

        Raises:
            ValueError: the responses are no episodes.
        """
        if rollout.rewards is None:
            raise ValueError(
                "EnvironmentReward needs an environment that gives it: set `environment` of PPOModule, or take another "
                "reward"
            )
        return rollout.rewards.sum(1)
