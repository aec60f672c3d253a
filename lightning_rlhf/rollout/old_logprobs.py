"""Where log π_old, the denominator of the ratio, comes from. The first ratio of a rollout is 1 by each of them."""

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
    """What decides which log-probs will do.

    Attributes:
        full_precision: the weights that sample are those that train, in float32 or more, without autocast.
        one_step: the rollout is learned from by one optimizer step with one forward pass.
        epochs: inner epochs; 0 where nothing is learned (evaluation).
    """

    full_precision: bool
    one_step: bool
    epochs: int


@dataclass(frozen=True, kw_only=True)
class OldLogprobs(ABC):
    """A source of log π_old."""

    meaning: ClassVar[str]
    """For the log."""

    @abstractmethod
    def why_not(self, situation: Situation) -> str | None:
        """Why it cannot serve, and what to do; None where it can."""

    @abstractmethod
    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """The rollout with its `logprobs`.

        Args:
            rollout: with the sampler's log-probs.
            measure: log π_θ of a rollout's tokens in pieces, (B, R).
            whole: the same in one piece, as the update does.
        """


@dataclass(frozen=True, kw_only=True)
class SamplerLogprobs(OldLogprobs):
    """Those the logits gave while sampling, at no cost: equal to a forward pass within 1e-4 in float32."""

    meaning: ClassVar[str] = "captured while sampling"

    def why_not(self, situation: Situation) -> str | None:
        """In low precision they are off by tenths of a nat per token (ratios of responses from 0.4 to 2)."""
        if situation.full_precision:
            return None
        return (
            "the weights that sample are of another or of low precision, so that their log-probs are not those of "
            "training: take RecomputedLogprobs(), or leave `updates.old_logprobs` out"
        )

    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """The sampler's."""
        return replace(rollout, logprobs=rollout.sampler_logprobs)


@dataclass(frozen=True, kw_only=True)
class RecomputedLogprobs(OldLogprobs):
    """By a forward pass before the updates, in their precision and kernels."""

    meaning: ClassVar[str] = "recomputed by a forward pass before the updates"

    def why_not(self, situation: Situation) -> str | None:
        """It always can."""

    @torch.no_grad()
    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """The policy's, as it is now."""
        return replace(rollout, logprobs=measure(rollout))


@dataclass(frozen=True, kw_only=True)
class UpdateLogprobs(OldLogprobs):
    """By the update's own forward pass, which is run before the scores: where there is but one, nothing is run twice.

    The pass's activations stay in memory while the reward and the reference score.
    """

    meaning: ClassVar[str] = "taken from the forward pass of the only update"

    def why_not(self, situation: Situation) -> str | None:
        """With several updates or microbatches, the graph of the first forward pass is not that of the others."""
        if situation.one_step:
            return None
        return (
            "a rollout is learned from in several steps or microbatches: take RecomputedLogprobs(), leave "
            "`updates.old_logprobs` out, or set updates.epochs=1 and neither updates.minibatch nor updates.microbatch"
        )

    def __call__(self, rollout: Rollout, measure: Measure, whole: Measure) -> Rollout:
        """The policy's, with their graph in `live`."""
        with torch.enable_grad():
            live = whole(rollout)
        return replace(rollout, logprobs=live.detach(), logprobs_with_grad=live)


def choose(setting: OldLogprobs | None, situation: Situation) -> OldLogprobs:
    """The setting where it can serve, or the cheapest that can.

    Raises:
        ValueError: the setting cannot serve.
    """
    if setting is not None and situation.epochs:
        if (reason := setting.why_not(situation)) is not None:
            raise ValueError(f"`updates.old_logprobs`={type(setting).__name__}() cannot be used here: {reason}")
        return setting
    if situation.full_precision and situation.epochs <= 1:
        return SamplerLogprobs()
    return UpdateLogprobs() if situation.one_step else RecomputedLogprobs()
