"""Warnings of rollouts without a training signal."""

from __future__ import annotations

import logging

import torch

from lightning_rlhf.core import Algorithm
from lightning_rlhf.types import Outcome

logger = logging.getLogger(__name__)


class TrainingSignal:
    """Checks rollouts for a training signal and warns once of each kind of its absence."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def look(self, outcome: Outcome, flat_groups: float, algorithm: Algorithm) -> None:
        """Warn of scores made equal by shaping, of groups with equal scores and of zero advantages.

        Args:
            outcome: a rollout of this process, with its advantages.
            flat_groups: share of all responses whose group scored the same.
            algorithm: that learns from it.
        """
        raw = outcome.raw_scores
        scores = outcome.scores
        advantages = outcome.advantages
        count = len(scores)
        limit = f"`generation.max_new_tokens`={int(outcome.rollout.lengths.max())}"
        if _spread(scores) == 0 and not torch.equal(raw.to(scores), scores) and not outcome.rollout.ended.any():
            self._warn(
                "shaping",
                f"all {count} responses reached {limit} without an end token, and `shaping` made each score "
                f"{float(scores[0]):g}; the reward itself gave {float(raw.min()):g} to {float(raw.max()):g}: nothing "
                "is learned of it; raise the limit, or change `shaping`",
            )
        elif flat_groups == 1 and count > 1:
            self._warn(
                "groups",
                f"all responses to each prompt scored alike ({float(raw.min()):g} to {float(raw.max()):g} over the "
                f"{count} responses), so that comparing those of a group teaches nothing; see whether the reward "
                "tells responses apart, and whether the prompts are neither too easy nor too hard",
            )
        elif advantages is not None and not advantages.any() and not algorithm.learns_without_reward:
            self._warn(
                "advantages",
                f"the advantages of all {count} responses are 0 (scores {float(raw.min()):g} to {float(raw.max()):g}): "
                "nothing is learned from this rollout",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning("%s (said once a run)", text)


def _spread(scores: torch.Tensor) -> float:
    return float(scores.max() - scores.min())
