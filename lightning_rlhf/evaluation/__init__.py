"""Evaluations of a policy against its reference."""

from lightning_rlhf.evaluation.alignment_tax import AlignmentTax
from lightning_rlhf.evaluation.best_of_n import BestOfN
from lightning_rlhf.evaluation.evaluator import Evaluator
from lightning_rlhf.evaluation.gold_reward import GoldReward
from lightning_rlhf.evaluation.pass_at_k import MajorityAtK, PassAtK
from lightning_rlhf.evaluation.win_rate import WinRate

__all__ = [
    "AlignmentTax",
    "BestOfN",
    "Evaluator",
    "GoldReward",
    "MajorityAtK",
    "PassAtK",
    "WinRate",
]
