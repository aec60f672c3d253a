"""Choices that are right alone and wrong together: refused or warned of before anything is built."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from lightning_rlhf.core import (
    CISPO,
    AdvantageEstimator,
    Clip,
    GeometricLevel,
    KLPenalty,
    MismatchWeights,
    ReplaceScore,
    Shaping,
    SoftOverlong,
    Surrogate,
    Whitened,
)
from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.core.level import ActionLevel
from lightning_rlhf.rollout import Generation, Reward

WIDEST_GEOMETRIC_BOUND = 0.05
"""No response's length-normalised ratio gets this far from 1 in a rollout: GSPO's own bounds are 3e-4 and 4e-4."""


def check_value(advantage: AdvantageEstimator, *, value: object, value_lr: float | None, value_loss: object) -> None:
    """Raises ValueError if something is set for a value network that the advantage does not train, or wrongly."""
    of_value = {"value": value, "value_lr": value_lr, "value_loss": value_loss}
    given = [name for name, setting in of_value.items() if setting is not None]
    if given and not advantage.needs_value:
        raise ValueError(
            f"`{'`, `'.join(given)}` belong to a value network, but {type(advantage).__name__} trains none: leave them "
            "out, or take an advantage such as GAE or BanditAdvantage(baseline=LearnedValue())"
        )
    if value_lr is not None:
        check_not_negative(value_lr=value_lr)


def check_groups(advantage: AdvantageEstimator, generation: Generation) -> None:
    """Raises ValueError if responses to one prompt are to be compared, and there is one of each."""
    if advantage.needs_group and generation.samples_per_prompt < 2:
        raise ValueError(
            f"{_named(advantage)} compares the responses to one prompt, but each prompt gets one: set "
            "`generation.samples_per_prompt` to at least 2"
        )


def check_level(level: ActionLevel, surrogate: Surrogate) -> None:
    """A length-normalised ratio needs bounds of its own size, of which it warns, and is no ratio of probabilities.

    Raises:
        ValueError: `KLPenalty` on it, whose penalty would be no KL.
    """
    while isinstance(surrogate, MismatchWeights):
        surrogate = surrogate.surrogate
    if not isinstance(level, GeometricLevel):
        return
    if isinstance(surrogate, KLPenalty):
        raise ValueError(
            "KLPenalty needs the ratio π_θ/π_old, but GeometricLevel normalises it by the length, so that its k3 is no "
            "KL: take SequenceLevel or TokenLevel, or Clip(epsilon=3e-4, epsilon_high=4e-4)"
        )
    for never in _idle_bounds(surrogate):
        warnings.warn(
            f"{never} never acts on GeometricLevel's length-normalised ratio: GSPO's bounds are epsilon=3e-4, "
            "epsilon_high=4e-4",
            stacklevel=3,
        )


def _idle_bounds(surrogate: Surrogate) -> list[str]:
    """The bounds of a surrogate that a length-normalised ratio does not reach, as one would write them."""
    if isinstance(surrogate, CISPO):
        near_one = abs(surrogate.largest - 1) <= WIDEST_GEOMETRIC_BOUND
        return [] if near_one else [f"CISPO(largest={surrogate.largest})"]
    if not isinstance(surrogate, Clip):
        return []
    idle = []
    if max(surrogate.epsilon, surrogate.epsilon_high or 0) > WIDEST_GEOMETRIC_BOUND:
        idle.append(f"Clip(epsilon={surrogate.epsilon}, epsilon_high={surrogate.epsilon_high})")
    if surrogate.dual is not None and surrogate.dual - 1 > WIDEST_GEOMETRIC_BOUND:
        idle.append(f"Clip(dual={surrogate.dual})")
    return idle


def shaping_of(reward: Reward) -> tuple[Shaping, ...]:
    """Rules on the score where none are given.

    −1 is low on the scale of a reward model that is normalized by its demonstrations, and unknown on any other.
    """
    return (ReplaceScore(),) if reward.is_learned else ()


def check_shaping(shaping: Sequence[Shaping], generation: Generation) -> None:
    """Warns of a penalty on lengths that no response reaches."""
    for rule in shaping:
        if isinstance(rule, SoftOverlong) and rule.limit - rule.buffer >= generation.max_new_tokens:
            warnings.warn(
                f"SoftOverlong(limit={rule.limit}, buffer={rule.buffer}) never acts: responses end at "
                f"`generation.max_new_tokens`={generation.max_new_tokens}; set `limit` to that",
                stacklevel=3,
            )


def _named(advantage: AdvantageEstimator) -> str:
    """What compares the responses: the estimator inside a whitening, or its baseline."""
    if isinstance(advantage, Whitened):
        return _named(advantage.estimator)
    baseline = getattr(advantage, "baseline", None)
    return type(advantage).__name__ if baseline is None else type(baseline).__name__
