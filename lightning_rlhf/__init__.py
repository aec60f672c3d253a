"""InstructGPT's three stages as PyTorch Lightning modules: SFT, reward model, and PPO as a contextual bandit.

Importing the package costs nothing; a name is loaded when it is first used. `lightning_rlhf.core` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROOMS = {
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
        "Stop",
    ),
    "core": (
        "ActionLevel",
        "AdaptiveKL",
        "AdvantageEstimator",
        "BanditAdvantage",
        "Baseline",
        "BatchMean",
        "BatchStd",
        "CISPO",
        "Centred",
        "Clip",
        "ClipScore",
        "ClippedValueLoss",
        "Combination",
        "Constant",
        "ConstantLength",
        "Cosine",
        "Credit",
        "FixedKL",
        "GAE",
        "GeometricLevel",
        "GroupAdvantage",
        "GroupScale",
        "GroupStd",
        "K1",
        "K2",
        "K3",
        "KLController",
        "KLEstimator",
        "KLInLoss",
        "KLInReward",
        "KLPenalty",
        "LearnedValue",
        "LeaveOneOut",
        "LengthNormalised",
        "LengthPenalty",
        "Linear",
        "MaskedWeights",
        "MeanOf",
        "MeanOfMeans",
        "MismatchWeights",
        "NoBaseline",
        "PerAction",
        "PlackettLuce",
        "PreferenceLoss",
        "RankingLoss",
        "Reduction",
        "ReferenceKL",
        "ReplaceScore",
        "RewardToGo",
        "RunningMean",
        "Schedule",
        "SequenceLevel",
        "SequenceMean",
        "Shaping",
        "SoftOverlong",
        "SubtractFromScore",
        "Surrogate",
        "TokenLevel",
        "TokenMean",
        "TruncatedWeights",
        "UncertaintyWeighted",
        "Unclipped",
        "Unscaled",
        "ValueLoss",
        "Whitened",
        "WorstOf",
    ),
    "data": ("Columns", "ComparisonDataModule", "DemonstrationDataModule", "HubData", "PromptDataModule"),
    "models": ("ModelSource", "PolicyModel", "ScalarModel"),
    "modules": (
        "AlignmentTax",
        "BestOfN",
        "Evaluator",
        "GoldReward",
        "PPOModule",
        "RewardModule",
        "SFTModule",
        "WinRate",
    ),
    "rollout": (
        "Captured",
        "EnsembleReward",
        "FromUpdate",
        "FunctionReward",
        "Generation",
        "LearnedReward",
        "ModuleReward",
        "OldLogprobs",
        "Recomputed",
        "Reward",
        "Scores",
        "TextReward",
        "TimedReward",
        "Updates",
        "WeightedReward",
    ),
    "types": ("ComparisonBatch", "Experience", "Outcome", "PPOBatch", "PromptBatch", "Rollout", "TextBatch"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
