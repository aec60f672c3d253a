"""From prompts to experience: sampling, scoring, and the order of updates."""

from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.composed import EnsembleReward, WeightedReward
from lightning_rlhf.rollout.decode import decode
from lightning_rlhf.rollout.draw import inverse_cdf
from lightning_rlhf.rollout.generation import SamplingParams, row_uniforms
from lightning_rlhf.rollout.learned import LearnedReward
from lightning_rlhf.rollout.old import OldLogprobs, RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs
from lightning_rlhf.rollout.record import Sampled
from lightning_rlhf.rollout.reward import FunctionReward, ModuleReward, Reward, Scores, TextReward, as_reward
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.timed import TimedReward
from lightning_rlhf.rollout.updates import UpdateSchedule

__all__ = [
    "SamplerLogprobs",
    "Collector",
    "EnsembleReward",
    "UpdateLogprobs",
    "FunctionReward",
    "SamplingParams",
    "LearnedReward",
    "ModuleReward",
    "OldLogprobs",
    "RecomputedLogprobs",
    "Reward",
    "Sampled",
    "Sampler",
    "Scores",
    "TextReward",
    "TimedReward",
    "UpdateSchedule",
    "WeightedReward",
    "as_reward",
    "decode",
    "inverse_cdf",
    "row_uniforms",
]
