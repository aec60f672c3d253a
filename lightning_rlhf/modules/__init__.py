"""The training stages as LightningModules."""

from lightning_rlhf.modules.ppo import PPOModule
from lightning_rlhf.modules.preference import PreferenceModule
from lightning_rlhf.modules.reward import RewardModule
from lightning_rlhf.modules.sft import SFTModule

__all__ = [
    "PPOModule",
    "PreferenceModule",
    "RewardModule",
    "SFTModule",
]
