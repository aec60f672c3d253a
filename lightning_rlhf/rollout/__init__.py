"""From prompts to experience: sampling, scoring, and the order of updates."""

from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.composed import EnsembleReward, WeightedReward
from lightning_rlhf.rollout.decode import decode
from lightning_rlhf.rollout.draw import inverse_cdf
from lightning_rlhf.rollout.generation import Generation, row_uniforms
from lightning_rlhf.rollout.learned import LearnedReward
from lightning_rlhf.rollout.old import Captured, FromUpdate, OldLogprobs, Recomputed
from lightning_rlhf.rollout.record import Sampled
from lightning_rlhf.rollout.reward import FunctionReward, ModuleReward, Reward, Scores, TextReward, as_reward
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.timed import TimedReward
from lightning_rlhf.rollout.updates import Updates

__all__ = [
    "Captured",
    "Collector",
    "EnsembleReward",
    "FromUpdate",
    "FunctionReward",
    "Generation",
    "LearnedReward",
    "ModuleReward",
    "OldLogprobs",
    "Recomputed",
    "Reward",
    "Sampled",
    "Sampler",
    "Scores",
    "TextReward",
    "TimedReward",
    "Updates",
    "WeightedReward",
    "as_reward",
    "decode",
    "inverse_cdf",
    "row_uniforms",
]
