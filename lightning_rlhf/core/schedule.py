"""Learning-rate schedules with linear warm-up."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_rlhf.core.checks import check_not_negative, check_unit_interval


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Factor on the peak learning rate. A step is an optimizer step in SFT and reward training, a rollout in PPO."""

    warmup: int = 0
    """Steps of linear warm-up to the peak; InstructGPT's RL stage uses 10."""
    warmup_start: float = 0.1
    """Factor at the first step of the warm-up, in [0, 1]."""

    def __post_init__(self) -> None:
        check_not_negative(warmup=self.warmup)
        check_unit_interval(warmup_start=self.warmup_start)

    def factor(self, step: int, total: int) -> float:
        """Factor lr/peak at a step.

        Args:
            step: steps done before this one, ≥ 0.
            total: steps of the whole run.
        """
        if step < self.warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / self.warmup
        span = max(total - self.warmup, 1)
        return self.decay(min((step - self.warmup) / span, 1.0))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Factor after the warm-up.

        Args:
            progress: share of the steps after warm-up that are done, in [0, 1].
        """


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(Schedule):
    """Constant peak after the warm-up (Ouyang et al. 2022, C.4)."""

    def decay(self, progress: float) -> float:
        """Return the constant factor 1."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """Linear decay from the peak to `floor`."""

    floor: float = 0.0
    """Factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        check_unit_interval(floor=self.floor)

    def decay(self, progress: float) -> float:
        """Compute 1 − (1 − floor)·progress."""
        return 1.0 - (1.0 - self.floor) * progress


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Schedule):
    """Half a cosine from the peak to `floor` (Ouyang et al. 2022, C.1 and C.2: to 10 %)."""

    floor: float = 0.1
    """Factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        check_unit_interval(floor=self.floor)

    def decay(self, progress: float) -> float:
        """Compute floor + (1 − floor)·½(1 + cos π·progress)."""
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
