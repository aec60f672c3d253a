"""Checks for settings that are valid alone and wrong together, made before anything is built."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningModule

from lightning_rlhf.core import (
    CISPO,
    AdvantageEstimator,
    Clip,
    GeometricLevel,
    GeometricTokenLevel,
    MismatchIS,
    Shaping,
    SoftOverlong,
    Surrogate,
    Whitened,
)
from lightning_rlhf.core.checks import check_not_negative
from lightning_rlhf.rewards import EnvironmentReward, ZeroReward
from lightning_rlhf.types import PromptBatch

WIDEST_GEOMETRIC_BOUND = 0.05
"""Distance from 1 that no length-normalized ratio reaches in a rollout: GSPO's own bounds are 3e-4 and 4e-4."""


def check_compatible(module: Any, *, reference: object, value: object, value_lr: float | None) -> None:
    """Refuse settings of a run that its algorithm cannot use, and warn of those that do nothing.

    Args:
        module: of the RL stage, with its parts.
        reference: source of the reference; None if it is the policy at the start.
        value: start of the value network.
        value_lr: its learning rate.

    Raises:
        ValueError: responses to one prompt are compared, and there is one of each; or something is set for a value
            network that is not trained; or the next prompts are drawn before it is known which they are.
    """
    algorithm, generation = module.algorithm, module.generation
    of_value = [name for name, setting in {"value": value, "value_lr": value_lr}.items() if setting is not None]
    if of_value and not algorithm.needs_value:
        raise ValueError(
            f"`{'`, `'.join(of_value)}` belong to a value network, but {type(algorithm.advantage).__name__} trains "
            "none: leave them out, or take an advantage such as GAE or BanditAdvantage(baseline=LearnedValue())"
        )
    if value_lr is not None:
        check_not_negative(value_lr=value_lr)
    if algorithm.advantage.needs_group and generation.samples_per_prompt == 1:
        raise ValueError(
            f"{_named(algorithm.advantage)} compares the responses to one prompt, but each prompt gets one: set "
            "`generation.samples_per_prompt` to at least 2"
        )
    if algorithm.dynamic_sampling is not None and (generation.samples_per_prompt or 1) < 2:
        raise ValueError(
            "`DynamicSampling` looks for prompts whose responses score differently, but each prompt gets one: set "
            "`generation.samples_per_prompt` to at least 2, or `algorithm.dynamic_sampling` to null"
        )
    if isinstance(module.reward, ZeroReward) and reference is None and algorithm.ptx_coef == 0:
        warnings.warn(
            "`ZeroReward` leaves the KL to the reference to be learned from, and the reference is the policy as it "
            "starts: name a teacher, `reference.path`",
            stacklevel=3,
        )
    _check_passes(module)
    _check_environment(module)
    for rule in algorithm.rules if module.environment is None else ():
        _warn_of_length(rule, generation.max_new_tokens)
    if isinstance(algorithm.level, GeometricLevel | GeometricTokenLevel):
        for never in _idle_bounds(algorithm.surrogate):
            warnings.warn(
                f"{never} never acts on {type(algorithm.level).__name__}'s length-normalized ratio: GSPO's bounds are "
                "epsilon=3e-4, epsilon_high=4e-4",
                stacklevel=3,
            )


def _check_passes(module: Any) -> None:
    """Refuse ways of drawing or computing that exclude each other."""
    if module.selection.selects and module.engine.overlaps:
        raise ValueError(
            "the engine's `overlap` draws the next prompts before this rollout's scores say which they are: set it to "
            "false, or leave out `algorithm.dynamic_sampling` and `curriculum`"
        )
    if module.compile_networks and module.updates.packing:
        raise ValueError(
            "`compile` and `updates.packing` do not go together: the compiled blocks would be made anew for each "
            "microbatch; leave one out"
        )


def _check_environment(module: Any) -> None:
    """Refuse what does not go together with an environment, or not without one."""
    if module.environment is None:
        if isinstance(module.reward, EnvironmentReward):
            raise ValueError(
                "`EnvironmentReward` is what an environment gives, and there is none: set "
                "`environment`=Episodes(factory=...), or take another reward"
            )
        return
    if module.engine.overlaps:
        raise ValueError("the engine's `overlap` draws single responses ahead, no episodes: set it to false")
    against = [evaluator.name for evaluator in module.evaluation.panel.given if evaluator.reference_samples]
    if against:
        raise ValueError(
            f"`evaluations`: {', '.join(against)} compare with responses of the reference, which plays no episodes "
            "with an `environment`: leave them out"
        )


def check_further(module: LightningModule, *, needed: bool) -> None:
    """Raise ValueError if prompts may be replaced, and the data have no further ones.

    Args:
        module: in training.
        needed: whether prompts may be replaced.
    """
    if needed and not hasattr(_data_of(module), "further_prompts"):
        raise ValueError(
            "`DynamicSampling` and `Curriculum` draw other prompts in the place of some, but the trainer has no data "
            "module with `further_prompts`: fit with a PromptDataModule, give your data module a method "
            "`further_prompts(number) -> PromptBatch`, or take DynamicSampling(batches=1)"
        )


def further_prompts(module: LightningModule, number: int) -> PromptBatch:
    """Return this process's share of one more batch of training prompts from the trainer's data module."""
    batch: PromptBatch = _data_of(module).further_prompts(number)
    return batch


def _data_of(module: LightningModule) -> Any:
    return getattr(module.trainer, "datamodule", None)


def _warn_of_length(rule: Shaping, max_new_tokens: int) -> None:
    """Warn of a penalty on lengths that no response reaches."""
    if not isinstance(rule, SoftOverlong) or rule.limit is None or rule.buffer is None:
        return
    if rule.limit - rule.buffer >= max_new_tokens:
        warnings.warn(
            f"SoftOverlong(limit={rule.limit}, buffer={rule.buffer}) never acts: responses end at "
            f"`generation.max_new_tokens`={max_new_tokens}; set `limit` to that",
            stacklevel=4,
        )


def _idle_bounds(surrogate: Surrogate) -> list[str]:
    """Return the bounds that a length-normalized ratio never reaches, as Python source."""
    while isinstance(surrogate, MismatchIS):
        surrogate = surrogate.surrogate
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


def _named(advantage: AdvantageEstimator) -> str:
    """Return the class name of the part that compares responses: the inner estimator or its baseline."""
    if isinstance(advantage, Whitened):
        return _named(advantage.estimator)
    baseline = getattr(advantage, "baseline", None)
    return type(advantage).__name__ if baseline is None else type(baseline).__name__
