"""Sources of log π_old, the denominator of the ratio; the first ratio of a rollout is 1 under each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lightning_rlhf.types import Rollout

Measure = Callable[[Rollout], Tensor]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Facts about a rollout that decide which sources of log π_old are exact.

    Attributes:
        full_precision: the weights that sample are those that train, in float32 or more, without autocast.
        one_step: the rollout is learned from by one optimizer step with one forward pass, which may go on from another.
        epochs: inner epochs; 0 where nothing is learned (evaluation).
        ahead: the rollout was drawn ahead of its step, by weights that are gone.
    """

    full_precision: bool
    one_step: bool
    epochs: int
    ahead: bool = False


AHEAD = (
    "the engine draws ahead of the update, and today's weights are not those that drew: take SamplerLogprobs(), leave "
    "`updates.old_logprobs` out, or set the engine's `overlap` to false"
)


@dataclass(frozen=True, kw_only=True)
class OldLogprobs(ABC):
    """Base class of the sources of log π_old."""

    meaning: ClassVar[str]
    """Name of the source in the log."""

    @abstractmethod
    def why_not(self, situation: Situation) -> str | None:
        """Return why the source is not exact here and what to do; returns None if it is."""

    @abstractmethod
    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """Fill in the `logprobs` of a rollout.

        Args:
            rollout: with the sampler's log-probs.
            measure: log π_θ of a rollout's tokens in pieces, (B, R).
            whole: the same in one piece, as the update does.
        """


@dataclass(frozen=True, kw_only=True)
class SamplerLogprobs(OldLogprobs):
    """Log-probs from the sampling logits at no cost, within 1e-4 of a forward pass in float32."""

    meaning: ClassVar[str] = "captured while sampling"

    def why_not(self, situation: Situation) -> str | None:
        """Return a reason in low precision, which is off by tenths of a nat per token (ratios of 0.4 to 2)."""
        if situation.full_precision or situation.ahead:
            return None
        return (
            "the weights that sample are of another or of low precision, so that their log-probs are not those of "
            "training: take RecomputedLogprobs(), or leave `updates.old_logprobs` out"
        )

    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """Take the sampler's log-probs."""
        return replace(rollout, logprobs=rollout.sampler_logprobs)


@dataclass(frozen=True, kw_only=True)
class RecomputedLogprobs(OldLogprobs):
    """Log-probs from a forward pass before the updates, in their precision and kernels."""

    meaning: ClassVar[str] = "recomputed by a forward pass before the updates"

    def why_not(self, situation: Situation) -> str | None:
        """Return a reason if the weights that drew are gone."""
        return AHEAD if situation.ahead else None

    @torch.no_grad()
    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """Recompute the log-probs with the current policy."""
        return replace(rollout, logprobs=measure(rollout))


@dataclass(frozen=True, kw_only=True)
class UpdateLogprobs(OldLogprobs):
    """Log-probs from the only update's own forward pass, which then runs before the scores.

    The pass's activations stay in memory while the reward and the reference score.
    """

    meaning: ClassVar[str] = "taken from the forward pass of the only update"

    def why_not(self, situation: Situation) -> str | None:
        """Return a reason if there are several updates or microbatches, whose graphs differ from the first's."""
        if situation.ahead:
            return AHEAD
        if situation.one_step:
            return None
        return (
            "a rollout is learned from in several steps or microbatches, or its loss sums over the vocabulary: take "
            "RecomputedLogprobs(), leave `updates.old_logprobs` out, or set updates.epochs=1 and neither "
            "updates.minibatch nor updates.microbatch"
        )

    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """Compute the log-probs with the current policy and keep their graph in `logprobs_with_grad`."""
        with torch.enable_grad():
            live = whole(rollout)
        return replace(rollout, logprobs=live.detach(), logprobs_with_grad=live)


def choose(setting: OldLogprobs | None, situation: Situation) -> OldLogprobs:
    """Return the configured source if it is applicable, or else the cheapest applicable one.

    Raises:
        ValueError: the setting cannot serve.
    """
    if setting is not None and situation.epochs:
        if (reason := setting.why_not(situation)) is not None:
            raise ValueError(f"`updates.old_logprobs`={type(setting).__name__}() cannot be used here: {reason}")
        return setting
    if situation.ahead or (situation.full_precision and situation.epochs <= 1):
        return SamplerLogprobs()
    return UpdateLogprobs() if situation.one_step else RecomputedLogprobs()
