"""Names of the package for type checkers and editors; a test holds them to `_EXPORTS`."""

from lightning_rlhf.callbacks import (
    EMA as EMA,
)
from lightning_rlhf.callbacks import (
    Export as Export,
)
from lightning_rlhf.callbacks import (
    GradientNorms as GradientNorms,
)
from lightning_rlhf.callbacks import (
    GuardAction as GuardAction,
)
from lightning_rlhf.callbacks import (
    KLGuard as KLGuard,
)
from lightning_rlhf.callbacks import (
    NonFiniteGuard as NonFiniteGuard,
)
from lightning_rlhf.callbacks import (
    PredictionWriter as PredictionWriter,
)
from lightning_rlhf.callbacks import (
    Preflight as Preflight,
)
from lightning_rlhf.callbacks import (
    RaiseKL as RaiseKL,
)
from lightning_rlhf.callbacks import (
    Report as Report,
)
from lightning_rlhf.callbacks import (
    RollBack as RollBack,
)
from lightning_rlhf.callbacks import (
    RolloutLog as RolloutLog,
)
from lightning_rlhf.callbacks import (
    RolloutProgress as RolloutProgress,
)
from lightning_rlhf.callbacks import (
    RunCheckpoint as RunCheckpoint,
)
from lightning_rlhf.callbacks import (
    SampleLog as SampleLog,
)
from lightning_rlhf.callbacks import (
    StopTraining as StopTraining,
)
from lightning_rlhf.core import (
    CISPO as CISPO,
)
from lightning_rlhf.core import (
    DAPO as DAPO,
)
from lightning_rlhf.core import (
    GAE as GAE,
)
from lightning_rlhf.core import (
    GRPO as GRPO,
)
from lightning_rlhf.core import (
    GSPO as GSPO,
)
from lightning_rlhf.core import (
    K1 as K1,
)
from lightning_rlhf.core import (
    K2 as K2,
)
from lightning_rlhf.core import (
    K3 as K3,
)
from lightning_rlhf.core import (
    RLOO as RLOO,
)
from lightning_rlhf.core import (
    TLDR as TLDR,
)
from lightning_rlhf.core import (
    ActionLevel as ActionLevel,
)
from lightning_rlhf.core import (
    AdaptiveKL as AdaptiveKL,
)
from lightning_rlhf.core import (
    AdvantageEstimator as AdvantageEstimator,
)
from lightning_rlhf.core import (
    AdvantagesAndReturns as AdvantagesAndReturns,
)
from lightning_rlhf.core import (
    Algorithm as Algorithm,
)
from lightning_rlhf.core import (
    BanditAdvantage as BanditAdvantage,
)
from lightning_rlhf.core import (
    Baseline as Baseline,
)
from lightning_rlhf.core import (
    BatchMean as BatchMean,
)
from lightning_rlhf.core import (
    BatchStd as BatchStd,
)
from lightning_rlhf.core import (
    Centered as Centered,
)
from lightning_rlhf.core import (
    CISPOMethod as CISPOMethod,
)
from lightning_rlhf.core import (
    Clip as Clip,
)
from lightning_rlhf.core import (
    ClippedValueLoss as ClippedValueLoss,
)
from lightning_rlhf.core import (
    ClipScore as ClipScore,
)
from lightning_rlhf.core import (
    Combination as Combination,
)
from lightning_rlhf.core import (
    ConstantSchedule as ConstantSchedule,
)
from lightning_rlhf.core import (
    CosineSchedule as CosineSchedule,
)
from lightning_rlhf.core import (
    DrGRPO as DrGRPO,
)
from lightning_rlhf.core import (
    FixedKL as FixedKL,
)
from lightning_rlhf.core import (
    GeometricLevel as GeometricLevel,
)
from lightning_rlhf.core import (
    GroupAdvantage as GroupAdvantage,
)
from lightning_rlhf.core import (
    GroupScale as GroupScale,
)
from lightning_rlhf.core import (
    GroupStd as GroupStd,
)
from lightning_rlhf.core import (
    ImportanceSampling as ImportanceSampling,
)
from lightning_rlhf.core import (
    InstructGPT as InstructGPT,
)
from lightning_rlhf.core import (
    KLController as KLController,
)
from lightning_rlhf.core import (
    KLEstimator as KLEstimator,
)
from lightning_rlhf.core import (
    KLInLoss as KLInLoss,
)
from lightning_rlhf.core import (
    KLInReward as KLInReward,
)
from lightning_rlhf.core import (
    KLPen as KLPen,
)
from lightning_rlhf.core import (
    LearnedValue as LearnedValue,
)
from lightning_rlhf.core import (
    LeaveOneOut as LeaveOneOut,
)
from lightning_rlhf.core import (
    LengthNormalized as LengthNormalized,
)
from lightning_rlhf.core import (
    LengthPenalty as LengthPenalty,
)
from lightning_rlhf.core import (
    LinearSchedule as LinearSchedule,
)
from lightning_rlhf.core import (
    MaskedIS as MaskedIS,
)
from lightning_rlhf.core import (
    MeanReward as MeanReward,
)
from lightning_rlhf.core import (
    MismatchIS as MismatchIS,
)
from lightning_rlhf.core import (
    MissingEOSPenalty as MissingEOSPenalty,
)
from lightning_rlhf.core import (
    NoBaseline as NoBaseline,
)
from lightning_rlhf.core import (
    NoScale as NoScale,
)
from lightning_rlhf.core import (
    PerAction as PerAction,
)
from lightning_rlhf.core import (
    PlackettLuce as PlackettLuce,
)
from lightning_rlhf.core import (
    PreferenceLoss as PreferenceLoss,
)
from lightning_rlhf.core import (
    RankingLoss as RankingLoss,
)
from lightning_rlhf.core import (
    Reduction as Reduction,
)
from lightning_rlhf.core import (
    ReferenceKL as ReferenceKL,
)
from lightning_rlhf.core import (
    ReinforcePP as ReinforcePP,
)
from lightning_rlhf.core import (
    RewardToGo as RewardToGo,
)
from lightning_rlhf.core import (
    RunningMean as RunningMean,
)
from lightning_rlhf.core import (
    Schedule as Schedule,
)
from lightning_rlhf.core import (
    SeqMeanTokenMean as SeqMeanTokenMean,
)
from lightning_rlhf.core import (
    SeqMeanTokenSum as SeqMeanTokenSum,
)
from lightning_rlhf.core import (
    SeqMeanTokenSumNorm as SeqMeanTokenSumNorm,
)
from lightning_rlhf.core import (
    SequenceLevel as SequenceLevel,
)
from lightning_rlhf.core import (
    Shaping as Shaping,
)
from lightning_rlhf.core import (
    SoftOverlong as SoftOverlong,
)
from lightning_rlhf.core import (
    Surrogate as Surrogate,
)
from lightning_rlhf.core import (
    TokenLevel as TokenLevel,
)
from lightning_rlhf.core import (
    TokenMean as TokenMean,
)
from lightning_rlhf.core import (
    TruncatedIS as TruncatedIS,
)
from lightning_rlhf.core import (
    TruncatedScore as TruncatedScore,
)
from lightning_rlhf.core import (
    UncertaintyWeighted as UncertaintyWeighted,
)
from lightning_rlhf.core import (
    ValueLoss as ValueLoss,
)
from lightning_rlhf.core import (
    Whitened as Whitened,
)
from lightning_rlhf.core import (
    WorstReward as WorstReward,
)
from lightning_rlhf.data import (
    ColumnNames as ColumnNames,
)
from lightning_rlhf.data import (
    ComparisonDataModule as ComparisonDataModule,
)
from lightning_rlhf.data import (
    DemonstrationDataModule as DemonstrationDataModule,
)
from lightning_rlhf.data import (
    HubData as HubData,
)
from lightning_rlhf.data import (
    PromptDataModule as PromptDataModule,
)
from lightning_rlhf.engines import (
    SamplingParams as SamplingParams,
)
from lightning_rlhf.evaluation import (
    AlignmentTax as AlignmentTax,
)
from lightning_rlhf.evaluation import (
    BestOfN as BestOfN,
)
from lightning_rlhf.evaluation import (
    Evaluator as Evaluator,
)
from lightning_rlhf.evaluation import (
    GoldReward as GoldReward,
)
from lightning_rlhf.evaluation import (
    WinRate as WinRate,
)
from lightning_rlhf.models import (
    ModelSource as ModelSource,
)
from lightning_rlhf.models import (
    PolicyModel as PolicyModel,
)
from lightning_rlhf.models import (
    ScalarModel as ScalarModel,
)
from lightning_rlhf.modules import (
    PPOModule as PPOModule,
)
from lightning_rlhf.modules import (
    RewardModule as RewardModule,
)
from lightning_rlhf.modules import (
    SFTModule as SFTModule,
)
from lightning_rlhf.rewards import (
    EnsembleReward as EnsembleReward,
)
from lightning_rlhf.rewards import (
    FunctionReward as FunctionReward,
)
from lightning_rlhf.rewards import (
    LearnedReward as LearnedReward,
)
from lightning_rlhf.rewards import (
    ModuleReward as ModuleReward,
)
from lightning_rlhf.rewards import (
    Reward as Reward,
)
from lightning_rlhf.rewards import (
    Scores as Scores,
)
from lightning_rlhf.rewards import (
    TextReward as TextReward,
)
from lightning_rlhf.rewards import (
    TimedReward as TimedReward,
)
from lightning_rlhf.rewards import (
    WeightedReward as WeightedReward,
)
from lightning_rlhf.rollout import (
    OldLogprobs as OldLogprobs,
)
from lightning_rlhf.rollout import (
    RecomputedLogprobs as RecomputedLogprobs,
)
from lightning_rlhf.rollout import (
    SamplerLogprobs as SamplerLogprobs,
)
from lightning_rlhf.rollout import (
    UpdateLogprobs as UpdateLogprobs,
)
from lightning_rlhf.rollout import (
    UpdateSchedule as UpdateSchedule,
)
from lightning_rlhf.types import (
    ComparisonBatch as ComparisonBatch,
)
from lightning_rlhf.types import (
    Experience as Experience,
)
from lightning_rlhf.types import (
    Outcome as Outcome,
)
from lightning_rlhf.types import (
    PPOBatch as PPOBatch,
)
from lightning_rlhf.types import (
    PromptBatch as PromptBatch,
)
from lightning_rlhf.types import (
    Rollout as Rollout,
)
from lightning_rlhf.types import (
    TextBatch as TextBatch,
)
