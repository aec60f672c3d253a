"""From prompts to experience: sampling, scoring, and the order of updates."""

from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.decode import Sampled, decode, inverse_cdf
from lightning_rlhf.rollout.generation import Generation, row_uniforms
from lightning_rlhf.rollout.learned import LearnedReward
from lightning_rlhf.rollout.reward import FunctionReward, ModuleReward, Reward, TextReward, as_reward
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.updates import Updates

__all__ = [
    "Collector",
    "FunctionReward",
    "Generation",
    "LearnedReward",
    "ModuleReward",
    "Reward",
    "Sampled",
    "Sampler",
    "TextReward",
    "Updates",
    "as_reward",
    "decode",
    "inverse_cdf",
    "row_uniforms",
]
