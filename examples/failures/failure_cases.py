"""The failures: what breaks a run, the metric that tells it first, and the guards that stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.callbacks import EarlyStopping
from toy_task import StaleEngine, by_level, variety, vowels, vowels_and_length

from lightning_rlhf import GRPO, GoldReward, KLGuard, RunCheckpoint, SamplingParams, UpdateSchedule
from lightning_rlhf.core import (
    AdaptiveEntropy,
    AdaptiveKL,
    Clip,
    Curriculum,
    DynamicSampling,
    EntropyBonus,
    KLInReward,
    LengthPenalty,
    MaskedIS,
    MissingEOSPenalty,
    NoCorrection,
    TruncatedIS,
)

WITHOUT = "without"
"""Name of the run without a guard."""
Settings = Callable[[], dict[str, Any]]
"""Arguments of `PPOModule`, and `callbacks` for the trainer, made anew for each run."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One failure.

    Attributes:
        metric: logged name of what tells it first.
        threshold: beyond which the run has failed.
        rises: the metric fails by rising above the threshold, otherwise by falling below it.
        broken: settings of the run that fails.
        guards: what a guard changes in them, by its name.
        tried: the same of what does not stop it.
        beside: metrics that are written down as well.
        drawn: the metric of the panel, one of these; empty for `metric`.
        rollouts: length of each run.
    """

    metric: str
    threshold: float
    rises: bool = True
    broken: Settings
    guards: dict[str, Settings]
    tried: dict[str, Settings] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    drawn: str = ""
    rollouts: int = 40

    @property
    def runs(self) -> dict[str, Settings]:
        """Changes of each run by its name; the first has none."""
        return {WITHOUT: dict} | self.guards | self.tried

    def failed(self, value: float) -> bool:
        """Return True if the value lies beyond the threshold."""
        return value > self.threshold if self.rises else value < self.threshold


GROUPS = SamplingParams(max_new_tokens=12, samples_per_prompt=8)
FREE = GRPO(beta=0.0)
"""GRPO without a KL."""


def usual(**changes: Any) -> dict[str, Any]:
    """GRPO on `vowels` without a KL, with some of it changed."""
    return {"reward": vowels, "algorithm": FREE, "generation": GROUPS, "lr": 1e-3} | changes


FAILURES = {
    "kl_explosion": Failure(
        metric="objective/kl",
        threshold=10.0,
        broken=lambda: usual(lr=1e-2),
        guards={
            "AdaptiveKL": lambda: {
                "algorithm": GRPO(beta=AdaptiveKL(coef=0.1, target=4.0, horizon=500), kl_term=KLInReward())
            },
            "KLGuard": lambda: {"callbacks": [KLGuard(kl=10.0)]},
        },
    ),
    "entropy_collapse": Failure(
        metric="policy/entropy_avg",
        threshold=0.5,
        rises=False,
        broken=lambda: usual(lr=3e-3, updates=UpdateSchedule(epochs=4)),
        guards={
            "EntropyBonus": lambda: {"algorithm": GRPO(beta=0.0, entropy_bonus=EntropyBonus(coef=0.05))},
            "AdaptiveEntropy": lambda: {
                "algorithm": GRPO(beta=0.0, entropy_bonus=AdaptiveEntropy(target=1.0, coef=0.1, step=0.02))
            },
        },
        tried={"clip_higher": lambda: {"algorithm": GRPO(beta=0.0, surrogate=Clip(epsilon=0.2, epsilon_high=0.28))}},
        beside=("objective/scores",),
    ),
    "length_hacking": Failure(
        metric="objective/response_length",
        threshold=11.0,
        broken=lambda: usual(reward=vowels_and_length, lr=3e-3),
        guards={
            "LengthPenalty": lambda: {"algorithm": GRPO(beta=0.0, shaping=LengthPenalty(coef=0.1))},
            "KLGuard": lambda: {"callbacks": [KLGuard(length=11.0)]},
        },
    ),
    "reward_hacking": Failure(
        metric="eval/gold/overoptimized",
        threshold=0.5,
        broken=lambda: usual(evaluations=[GoldReward(reward=variety)]),
        guards={
            "best_by_gold": lambda: {
                "callbacks": [
                    EarlyStopping(monitor="eval/gold/reward", mode="max", patience=1),
                    RunCheckpoint(monitor="eval/gold/reward", every_n_batches=100),
                ]
            },
        },
        tried={
            "AdaptiveKL": lambda: {
                "algorithm": GRPO(beta=AdaptiveKL(coef=0.1, target=2.0, horizon=500), kl_term=KLInReward())
            }
        },
        beside=("eval/gold/reward", "eval/reward", "eval/kl"),
        drawn="eval/gold/reward",
    ),
    "all_truncated": Failure(
        metric="objective/eos_rate",
        threshold=0.5,
        rises=False,
        broken=lambda: usual(generation=SamplingParams(max_new_tokens=4, samples_per_prompt=8)),
        guards={
            "MissingEOSPenalty": lambda: {"algorithm": GRPO(beta=0.0, shaping=MissingEOSPenalty(penalty=1.0))},
            "longer_too": lambda: {
                "algorithm": GRPO(beta=0.0, shaping=MissingEOSPenalty(penalty=1.0)),
                "generation": SamplingParams(max_new_tokens=28, samples_per_prompt=8),
            },
        },
    ),
    "flat_groups": Failure(
        metric="objective/flat_groups",
        threshold=0.8,
        broken=lambda: usual(reward=by_level),
        guards={
            "DynamicSampling": lambda: {"algorithm": GRPO(beta=0.0, dynamic_sampling=DynamicSampling(batches=16))},
            "Curriculum": lambda: {"curriculum": Curriculum(decay=0.0, rest=100)},
        },
        beside=("filter/batches",),
        rollouts=60,
    ),
    "stale_sampler": Failure(
        metric="policy/kl_sampler",
        threshold=0.1,
        broken=lambda: usual(engine=StaleEngine(honest=False), algorithm=GRPO(beta=0.0, surrogate=NoCorrection())),
        guards={
            "versions": lambda: {"engine": StaleEngine(honest=True)},
        },
        tried={
            "TruncatedIS": lambda: {"algorithm": GRPO(beta=0.0, surrogate=TruncatedIS())},
            "MaskedIS": lambda: {"algorithm": GRPO(beta=0.0, surrogate=MaskedIS())},
        },
        beside=("policy/sampler_ess", "objective/kl"),
    ),
}
