"""InstructGPT's three stages as PyTorch Lightning modules: SFT, reward model, and PPO as a contextual bandit.

Importing the package costs nothing; a name is loaded when it is first used. `lightning_rlhf.core` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_ROOMS = {
    "callbacks": ("EMA", "Export", "PredictionWriter"),
    "core": (
        "GAE",
        "ActionLevel",
        "AdaptiveKL",
        "AdvantageEstimator",
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
    ),
    "data": ("Columns", "ComparisonDataModule", "DemonstrationDataModule", "PromptDataModule"),
    "models": ("ModelSource", "PolicyModel", "ScalarModel"),
    "modules": ("PPOModule", "RewardModule", "SFTModule"),
    "rollout": ("FunctionReward", "Generation", "LearnedReward", "ModuleReward", "Reward", "TextReward", "Updates"),
    "types": ("ComparisonBatch", "Experience", "PPOBatch", "PromptBatch", "Rollout", "TextBatch"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
