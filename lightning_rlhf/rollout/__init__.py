"""Collection of experience from prompts and the order of updates on it."""

from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.episodes import Episodes
from lightning_rlhf.rollout.old_logprobs import OldLogprobs, RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs
from lightning_rlhf.rollout.updates import UpdateSchedule

__all__ = [
    "Collector",
    "Episodes",
    "OldLogprobs",
    "RecomputedLogprobs",
    "SamplerLogprobs",
    "UpdateLogprobs",
    "UpdateSchedule",
]
