"""Rewards made of several: a weighted sum or an ensemble with every part logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import Combination, MeanReward
from lightning_rlhf.rewards.reward import Reward, Scores, as_reward
from lightning_rlhf.types import Objectives, Rollout, Row


class ComposedReward(Reward):
    """Base class of rewards that combine several on the same responses.

    Args:
        members: by name; a `Reward`, an `nn.Module` on token ids, or a function.

    Raises:
        ValueError: there is none, or a name holds a slash, which stands between a member and its own parts.
    """

    def __init__(self, members: Mapping[str, Reward | Callable[..., Any]]) -> None:
        if not members:
            raise ValueError(f"{type(self).__name__} needs at least one reward: got none")
        slashed = sorted(name for name in members if "/" in name)
        if slashed:
            raise ValueError(f"names of rewards must hold no '/', which separates nested parts: got {slashed}")
        self.members = {name: as_reward(member) for name, member in members.items()}

    def prepare(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Prepare every member reward for training."""
        super().prepare(tokenizer)
        for member in self.members.values():
            member.prepare(tokenizer)

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if a member needs a column that the data lack."""
        for member in self.members.values():
            member.check_columns(names)

    def networks(self) -> list[nn.Module]:
        """List the networks of every member."""
        return [network for member in self.members.values() for network in member.networks()]

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the combined score, (B,)."""
        return self.scored(rollout, rows).total

    def _scored_members(self, rollout: Rollout, rows: Sequence[Row]) -> tuple[dict[str, Scores], dict[str, Tensor]]:
        """Return the scores of each member and all parts by name, those of a member as `name/part`."""
        scored = {name: member.scored(rollout, rows) for name, member in self.members.items()}
        totals = {name: scores.total for name, scores in scored.items()}
        inner = {f"{name}/{part}": x for name, scores in scored.items() for part, x in scores.parts.items()}
        return scored, totals | inner


def _answered(scores: Scores) -> Tensor:
    return torch.ones_like(scores.total, dtype=torch.bool) if scores.answered is None else scores.answered


class WeightedReward(ComposedReward):
    """Weighted sum Σ_i w_i·r_i of several rewards, for example helpfulness and brevity.

    A reward whose score of a response is None adds nothing to its sum, so that each task of a mixture has its own.

    Args:
        parts: rewards by name; the name is logged.
        weights: w_i by the same names; None weighs each with 1.

    Raises:
        ValueError: `weights` has other names than `parts`, or a number that is not finite.
    """

    def __init__(self, parts: dict[str, Reward | Callable[..., Any]], weights: dict[str, float] | None = None) -> None:
        super().__init__(parts)
        self.weights = dict.fromkeys(parts, 1.0) if weights is None else weights
        if self.weights.keys() != parts.keys():
            raise ValueError(f"`weights` must name the parts {sorted(parts)}: got {sorted(self.weights)}")
        if not all(math.isfinite(weight) for weight in self.weights.values()):
            raise ValueError(f"`weights` must be finite numbers: got {self.weights}")

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the weighted sum; its parts are the members' scores before their weights, NaN for None."""
        members, parts = self._scored_members(rollout, rows)
        weighted = [
            torch.where(_answered(scores), self.weights[name] * scores.total, 0.0) for name, scores in members.items()
        ]
        answered = torch.stack([_answered(scores) for scores in members.values()]).any(0)
        total = torch.stack(weighted).sum(0).masked_fill(~answered, torch.nan)
        of_members = [torch.where(_answered(scores), scores.total, torch.nan) for scores in members.values()]
        objectives = Objectives(torch.stack(of_members, 1), total.new_tensor([self.weights[name] for name in members]))
        return Scores(total, parts, answered=answered, objectives=objectives)


class EnsembleReward(ComposedReward):
    """Several reward models of the same goal, combined so that the policy does not learn one model's errors.

    Members should differ by more than the seed of their head: those of one pretraining share its errors (Coste et al.
    2023).

    Args:
        rewards: at least two.
        combine: mean, worst case, or mean less λ times the variance.

    Raises:
        ValueError: there are fewer than two.
    """

    def __init__(self, rewards: list[Reward | Callable[..., Any]], combine: Combination = MeanReward()) -> None:
        if len(rewards) < 2:
            raise ValueError(f"`rewards` must hold at least 2 members: got {len(rewards)}")
        super().__init__({f"member_{i}": reward for i, reward in enumerate(rewards)})
        self.combine = combine

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the combined score; its parts are the members' scores and `spread`, their standard deviation.

        Raises:
            ValueError: some members scored a response and others returned None.
        """
        members, parts = self._scored_members(rollout, rows)
        answered = torch.stack([_answered(scores) for scores in members.values()])
        mixed = answered.any(0) & ~answered.all(0)
        if mixed.any():
            first = int(mixed.nonzero()[0])
            silent = [name for name, mine in zip(members, answered[:, first].tolist(), strict=True) if not mine]
            raise ValueError(
                f"the members of an EnsembleReward have one goal, but {', '.join(silent)} returned None for response "
                f"{first} and others a number: sum rewards of different tasks with WeightedReward"
            )
        totals = [scores.total for scores in members.values()]
        scores = torch.stack([total.to(torch.promote_types(total.dtype, torch.float32)) for total in totals])
        return Scores(self.combine(scores), parts | {"spread": scores.std(0, correction=0)}, answered=answered.all(0))
