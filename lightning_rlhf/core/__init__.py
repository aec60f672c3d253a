"""The mathematics: torch only, no lightning, no transformers, no I/O.

Every equation is named with its source in the docstring of the function or class that computes it.
"""

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.advantage import GAE, AdvantageEstimator, BanditAdvantage, Credit, Whitened
from lightning_rlhf.core.baseline import Baseline, BatchMean, NoBaseline
from lightning_rlhf.core.controller import AdaptiveKL, FixedKL, KLController
from lightning_rlhf.core.kl import k1, k2, k3
from lightning_rlhf.core.level import ActionLevel, SequenceLevel, TokenLevel
from lightning_rlhf.core.logprobs import entropy, full_precision, token_logprobs
from lightning_rlhf.core.masked import AllSum, local, masked_mean, masked_sum, masked_variance, whiten
from lightning_rlhf.core.missing_eos import MissingEOS, ReplaceScore, SubtractFromScore
from lightning_rlhf.core.preference import PreferenceLoss, RankingLoss, preferred_pairs, score_margins
from lightning_rlhf.core.pretrain import next_token_loss
from lightning_rlhf.core.reduction import Reduction, SequenceMean, TokenMean
from lightning_rlhf.core.reward import penalised_rewards
from lightning_rlhf.core.schedule import Constant, Cosine, Linear, Schedule
from lightning_rlhf.core.surrogate import Clip, KLPenalty, PerAction, Surrogate, importance_ratio
from lightning_rlhf.core.value import ClippedValueLoss, ValueLoss

__all__ = [
    "GAE",
    "ActionLevel",
    "Adaptive",
    "AdaptiveKL",
    "AdvantageEstimator",
    "AllSum",
    "BanditAdvantage",
    "Baseline",
    "BatchMean",
    "Clip",
    "ClippedValueLoss",
    "Constant",
    "Cosine",
    "Credit",
    "FixedKL",
    "KLController",
    "KLPenalty",
    "Linear",
    "MissingEOS",
    "NoBaseline",
    "PerAction",
    "PreferenceLoss",
    "RankingLoss",
    "Reduction",
    "ReplaceScore",
    "Schedule",
    "SequenceLevel",
    "SequenceMean",
    "SubtractFromScore",
    "Surrogate",
    "TokenLevel",
    "TokenMean",
    "ValueLoss",
    "Whitened",
    "entropy",
    "full_precision",
    "importance_ratio",
    "k1",
    "k2",
    "k3",
    "local",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "next_token_loss",
    "penalised_rewards",
    "preferred_pairs",
    "score_margins",
    "token_logprobs",
    "whiten",
]
