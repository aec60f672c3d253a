"""Rewards and combinations of them."""

from lightning_rlhf.rewards.chat import ChatModel
from lightning_rlhf.rewards.composed import EnsembleReward, WeightedReward
from lightning_rlhf.rewards.environment import EnvironmentReward
from lightning_rlhf.rewards.judge import Judge, PairwiseJudge
from lightning_rlhf.rewards.learned import LearnedReward
from lightning_rlhf.rewards.patterns import Format, RegexMatch
from lightning_rlhf.rewards.per_response import PerResponse
from lightning_rlhf.rewards.program import ProgramReward
from lightning_rlhf.rewards.reward import FunctionReward, ModuleReward, Reward, Scores, TextReward, as_reward
from lightning_rlhf.rewards.timed import TimedReward
from lightning_rlhf.rewards.verifiable import MathAnswer, ReasoningGym
from lightning_rlhf.rewards.zero import ZeroReward

__all__ = [
    "ChatModel",
    "EnsembleReward",
    "EnvironmentReward",
    "Format",
    "FunctionReward",
    "Judge",
    "LearnedReward",
    "MathAnswer",
    "ModuleReward",
    "PairwiseJudge",
    "PerResponse",
    "ProgramReward",
    "ReasoningGym",
    "RegexMatch",
    "Reward",
    "Scores",
    "TextReward",
    "TimedReward",
    "WeightedReward",
    "ZeroReward",
    "as_reward",
]
