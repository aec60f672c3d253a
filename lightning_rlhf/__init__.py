"""InstructGPT's three stages as PyTorch Lightning modules: SFT, reward model, and PPO as a contextual bandit.

Importing the package costs nothing; a name is loaded when it is first used. `lightning_rlhf.core` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "callbacks": (
        "EMA",
        "Export",
        "GradientNorms",
        "GuardAction",
        "KLGuard",
        "NonFiniteGuard",
        "PredictionWriter",
        "Preflight",
        "RaiseKL",
        "Report",
        "RollBack",
        "RolloutLog",
        "RolloutProgress",
        "RunCheckpoint",
        "SampleLog",
        "StopTraining",
    ),
    "core": (
        "ActionLevel",
        "AdaptiveKL",
        "AdvantageEstimator",
        "AdvantagesAndReturns",
        "Algorithm",
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
        "CosineSchedule",
        "DAPO",
        "DrGRPO",
        "FixedKL",
        "GAE",
        "GRPO",
        "GSPO",
        "GeometricLevel",
        "GroupAdvantage",
        "GroupScale",
        "GroupStd",
        "ImportanceSampling",
        "InstructGPT",
        "K1",
        "K2",
        "K3",
        "KLController",
        "KLEstimator",
        "KLInLoss",
        "KLInReward",
        "KLPen",
        "LearnedValue",
        "LeaveOneOut",
        "LengthNormalized",
        "LengthPenalty",
        "LinearSchedule",
        "MaskedIS",
        "MeanReward",
        "MismatchIS",
        "MissingEOSPenalty",
        "NoBaseline",
        "NoScale",
        "PerAction",
        "PlackettLuce",
        "PreferenceLoss",
        "RLOO",
        "RankingLoss",
        "Reduction",
        "ReferenceKL",
        "ReinforcePP",
        "RewardToGo",
        "RunningMean",
        "Schedule",
        "SeqMeanTokenMean",
        "SeqMeanTokenSum",
        "SeqMeanTokenSumNorm",
        "SequenceLevel",
        "Shaping",
        "SoftOverlong",
        "Surrogate",
        "TLDR",
        "TokenLevel",
        "TokenMean",
        "TruncatedIS",
        "TruncatedScore",
        "UncertaintyWeighted",
        "ValueLoss",
        "Whitened",
        "WorstReward",
    ),
    "data": (
        "ColumnNames",
        "ComparisonDataModule",
        "DemonstrationDataModule",
        "HubData",
        "PromptDataModule",
    ),
    "engines": ("SamplingParams",),
    "evaluation": (
        "AlignmentTax",
        "BestOfN",
        "Evaluator",
        "GoldReward",
        "WinRate",
    ),
    "models": (
        "ModelSource",
        "PolicyModel",
        "ScalarModel",
    ),
    "modules": (
        "PPOModule",
        "RewardModule",
        "SFTModule",
    ),
    "rewards": (
        "EnsembleReward",
        "FunctionReward",
        "LearnedReward",
        "ModuleReward",
        "Reward",
        "Scores",
        "TextReward",
        "TimedReward",
        "WeightedReward",
    ),
    "rollout": (
        "OldLogprobs",
        "RecomputedLogprobs",
        "SamplerLogprobs",
        "UpdateLogprobs",
        "UpdateSchedule",
    ),
    "types": (
        "ComparisonBatch",
        "Experience",
        "Outcome",
        "PPOBatch",
        "PromptBatch",
        "Rollout",
        "TextBatch",
    ),
}
_HOME = {name: room for room, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
