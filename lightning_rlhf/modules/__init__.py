"""The three stages as LightningModules, and evaluations of the last."""

from lightning_rlhf.modules.alignment_tax import AlignmentTax
from lightning_rlhf.modules.best_of_n import BestOfN
from lightning_rlhf.modules.evaluator import Evaluator
from lightning_rlhf.modules.gold_reward import GoldReward
from lightning_rlhf.modules.ppo import PPOModule
from lightning_rlhf.modules.reward import RewardModule
from lightning_rlhf.modules.sft import SFTModule
from lightning_rlhf.modules.win_rate import WinRate

__all__ = [
    "AlignmentTax",
    "BestOfN",
    "Evaluator",
    "GoldReward",
    "PPOModule",
    "RewardModule",
    "SFTModule",
    "WinRate",
]
