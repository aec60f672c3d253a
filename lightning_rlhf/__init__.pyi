"""Public names of the package by room, for `_EXPORTS`, type checkers and editors."""
# ruff: isort: skip_file

from lightning_rlhf.callbacks import (
    EMA as EMA,
    Export as Export,
    GradientNorms as GradientNorms,
    KLGuard as KLGuard,
    MovingReference as MovingReference,
    NonFiniteGuard as NonFiniteGuard,
    PredictionWriter as PredictionWriter,
    Preflight as Preflight,
    Report as Report,
    RolloutLog as RolloutLog,
    RolloutProgress as RolloutProgress,
    RunCheckpoint as RunCheckpoint,
    SampleLog as SampleLog,
)
from lightning_rlhf.core import (
    AdvantageEstimator as AdvantageEstimator,
    Algorithm as Algorithm,
    CISPOMethod as CISPOMethod,
    DAPO as DAPO,
    DrGRPO as DrGRPO,
    GRPO as GRPO,
    GSPO as GSPO,
    GDPO as GDPO,
    InstructGPT as InstructGPT,
    MaxRL as MaxRL,
    OnPolicyDistillation as OnPolicyDistillation,
    LUSPO as LUSPO,
    RLOO as RLOO,
    ReinforcePP as ReinforcePP,
    SAPOMethod as SAPOMethod,
    Shaping as Shaping,
    Surrogate as Surrogate,
    TLDR as TLDR,
    VESPOMethod as VESPOMethod,
)
from lightning_rlhf.data import (
    ComparisonDataModule as ComparisonDataModule,
    DemonstrationDataModule as DemonstrationDataModule,
    LabeledDataModule as LabeledDataModule,
    PromptDataModule as PromptDataModule,
)
from lightning_rlhf.engines import (
    SamplingParams as SamplingParams,
)
from lightning_rlhf.evaluation import (
    AlignmentTax as AlignmentTax,
    BestOfN as BestOfN,
    Evaluator as Evaluator,
    GoldReward as GoldReward,
    WinRate as WinRate,
)
from lightning_rlhf.models import (
    ModelSource as ModelSource,
)
from lightning_rlhf.modules import (
    PPOModule as PPOModule,
    PreferenceModule as PreferenceModule,
    RewardModule as RewardModule,
    SFTModule as SFTModule,
)
from lightning_rlhf.rewards import (
    EnsembleReward as EnsembleReward,
    LearnedReward as LearnedReward,
    Reward as Reward,
    TextReward as TextReward,
    TimedReward as TimedReward,
    WeightedReward as WeightedReward,
)
from lightning_rlhf.rollout import (
    UpdateSchedule as UpdateSchedule,
)
