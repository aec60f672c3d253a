"""Mathematics of RLHF in torch alone, without other packages or I/O.

Every equation is named with its source in the docstring of the function or class that computes it.
"""

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.advantage import (
    GAE,
    AdvantageEstimator,
    AdvantagesAndReturns,
    BanditAdvantage,
    RewardToGo,
    Whitened,
)
from lightning_rlhf.core.algorithm import Algorithm
from lightning_rlhf.core.baseline import Baseline, BatchMean, LearnedValue, LeaveOneOut, NoBaseline, RunningMean
from lightning_rlhf.core.clip import CISPO, Clip
from lightning_rlhf.core.controller import AdaptiveKL, FixedKL, KLController
from lightning_rlhf.core.direct_preference import DPO, IPO, KTO, DirectPreferenceLoss, PairLoss, response_labels
from lightning_rlhf.core.ensemble import Combination, MeanReward, UncertaintyWeighted, WorstReward
from lightning_rlhf.core.entropy_bonus import AdaptiveEntropy, EntropyBonus
from lightning_rlhf.core.evaluation import (
    best_of_n_kl,
    expected_best,
    length_controlled,
    n_of_kl,
    ratio_standard_error,
    standard_error,
)
from lightning_rlhf.core.group_advantage import BatchStd, GroupAdvantage, GroupMean, GroupScale, GroupStd, NoScale
from lightning_rlhf.core.groups import group_mean, group_size, group_std, group_sum
from lightning_rlhf.core.kl import k1, k2, k3
from lightning_rlhf.core.kl_term import (
    K1,
    K2,
    K3,
    ExactKL,
    KLEstimator,
    KLInLoss,
    KLInReward,
    ReferenceKL,
    penalized_rewards,
)
from lightning_rlhf.core.klpen import KLPen
from lightning_rlhf.core.level import ActionLevel, GeometricLevel, GeometricTokenLevel, SequenceLevel, TokenLevel
from lightning_rlhf.core.logprobs import full_precision, next_token_loss, token_logprobs
from lightning_rlhf.core.majority import majority_at_k
from lightning_rlhf.core.masked import AllSum, local, masked_mean, masked_sum, masked_variance, whiten
from lightning_rlhf.core.masks import DPPOMask, LossMask, MaskTruncated, OffPolicyMask, TopEntropy
from lightning_rlhf.core.methods import (
    DAPO,
    GDPO,
    GRPO,
    GSPO,
    LUSPO,
    RLOO,
    TLDR,
    CISPOMethod,
    DrGRPO,
    InstructGPT,
    MaxRL,
    OnPolicyDistillation,
    ReinforcePP,
    SAPOMethod,
    VESPOMethod,
)
from lightning_rlhf.core.mismatch import MaskedIS, MismatchIS, NoCorrection, TruncatedIS
from lightning_rlhf.core.per_reward import PerReward
from lightning_rlhf.core.preference import (
    Centered,
    PlackettLuce,
    PreferenceLoss,
    RankingLoss,
    preferred_pairs,
    score_margins,
)
from lightning_rlhf.core.prompt_choice import Curriculum, DynamicSampling
from lightning_rlhf.core.reduction import Reduction, SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm, TokenMean
from lightning_rlhf.core.schedule import ConstantSchedule, CosineSchedule, LinearSchedule, Schedule
from lightning_rlhf.core.shaping import (
    ClipScore,
    LengthNormalized,
    LengthPenalty,
    MissingEOSPenalty,
    RunningNormalized,
    Shaping,
    SoftOverlong,
    TruncatedScore,
)
from lightning_rlhf.core.soft_clip import SAPO, VESPO
from lightning_rlhf.core.surrogate import ImportanceSampling, PerAction, SamplerWeights, Surrogate, importance_ratio
from lightning_rlhf.core.value import ClippedValueLoss, ValueLoss

__all__ = [
    "ActionLevel",
    "Adaptive",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "AdvantageEstimator",
    "Algorithm",
    "AllSum",
    "BanditAdvantage",
    "Baseline",
    "BatchMean",
    "BatchStd",
    "CISPO",
    "CISPOMethod",
    "Centered",
    "Clip",
    "ClipScore",
    "ClippedValueLoss",
    "Combination",
    "ConstantSchedule",
    "SeqMeanTokenSumNorm",
    "CosineSchedule",
    "AdvantagesAndReturns",
    "Curriculum",
    "DAPO",
    "DPO",
    "DPPOMask",
    "DirectPreferenceLoss",
    "DrGRPO",
    "DynamicSampling",
    "EntropyBonus",
    "ExactKL",
    "FixedKL",
    "GAE",
    "GDPO",
    "GRPO",
    "GSPO",
    "GeometricLevel",
    "GeometricTokenLevel",
    "GroupAdvantage",
    "GroupMean",
    "GroupScale",
    "GroupStd",
    "IPO",
    "InstructGPT",
    "K1",
    "K2",
    "K3",
    "KLController",
    "KLEstimator",
    "KLInLoss",
    "KLInReward",
    "KLPen",
    "KTO",
    "LUSPO",
    "LearnedValue",
    "LeaveOneOut",
    "LengthNormalized",
    "LengthPenalty",
    "LinearSchedule",
    "LossMask",
    "MaskTruncated",
    "MaskedIS",
    "MaxRL",
    "MeanReward",
    "SeqMeanTokenMean",
    "MismatchIS",
    "NoBaseline",
    "NoCorrection",
    "OffPolicyMask",
    "OnPolicyDistillation",
    "PairLoss",
    "PerAction",
    "PerReward",
    "PlackettLuce",
    "PreferenceLoss",
    "RLOO",
    "RankingLoss",
    "Reduction",
    "ReferenceKL",
    "ReinforcePP",
    "TruncatedScore",
    "RewardToGo",
    "RunningMean",
    "RunningNormalized",
    "SAPO",
    "SAPOMethod",
    "SamplerWeights",
    "Schedule",
    "SequenceLevel",
    "SeqMeanTokenSum",
    "Shaping",
    "SoftOverlong",
    "MissingEOSPenalty",
    "Surrogate",
    "TLDR",
    "TokenLevel",
    "TopEntropy",
    "TokenMean",
    "TruncatedIS",
    "UncertaintyWeighted",
    "ImportanceSampling",
    "NoScale",
    "VESPO",
    "VESPOMethod",
    "ValueLoss",
    "Whitened",
    "WorstReward",
    "best_of_n_kl",
    "expected_best",
    "full_precision",
    "group_mean",
    "group_size",
    "group_std",
    "group_sum",
    "importance_ratio",
    "k1",
    "k2",
    "k3",
    "length_controlled",
    "local",
    "majority_at_k",
    "masked_mean",
    "masked_sum",
    "masked_variance",
    "n_of_kl",
    "next_token_loss",
    "penalized_rewards",
    "preferred_pairs",
    "ratio_standard_error",
    "response_labels",
    "score_margins",
    "standard_error",
    "token_logprobs",
    "whiten",
]
