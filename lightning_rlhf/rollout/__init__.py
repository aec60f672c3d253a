"""Collection of experience from prompts and the order of updates on it."""

from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.old_logprobs import OldLogprobs, RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs
from lightning_rlhf.rollout.updates import UpdateSchedule

__all__ = [
    "Collector",
    "OldLogprobs",
    "RecomputedLogprobs",
    "SamplerLogprobs",
    "UpdateLogprobs",
    "UpdateSchedule",
]
