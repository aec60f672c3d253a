"""Published methods as `Algorithm`s with other defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_rlhf.core.advantage import GAE, AdvantageEstimator, BanditAdvantage, RewardToGo, Whitened
from lightning_rlhf.core.algorithm import Algorithm
from lightning_rlhf.core.baseline import LeaveOneOut
from lightning_rlhf.core.clip import CISPO, Clip
from lightning_rlhf.core.controller import KLController
from lightning_rlhf.core.group_advantage import GroupAdvantage, GroupMean, NoScale
from lightning_rlhf.core.kl_term import K3, ExactKL, KLInLoss, ReferenceKL
from lightning_rlhf.core.level import ActionLevel, GeometricLevel, GeometricTokenLevel, SequenceLevel, TokenLevel
from lightning_rlhf.core.per_reward import PerReward
from lightning_rlhf.core.prompt_choice import DynamicSampling
from lightning_rlhf.core.reduction import Reduction, SeqMeanTokenMean, SeqMeanTokenSum, SeqMeanTokenSumNorm
from lightning_rlhf.core.shaping import Shaping, SoftOverlong
from lightning_rlhf.core.soft_clip import SAPO, VESPO
from lightning_rlhf.core.surrogate import ImportanceSampling, Surrogate


@dataclass(frozen=True, kw_only=True)
class InstructGPT(Algorithm):
    """PPO-ptx per token, with a value network (Ouyang et al. 2022, 2203.02155, C.4)."""

    level: ActionLevel = TokenLevel()
    advantage: AdvantageEstimator = field(default_factory=lambda: Whitened(estimator=GAE()))
    ptx_coef: float = 27.8


@dataclass(frozen=True, kw_only=True)
class TLDR(Algorithm):
    """PPO per token on summaries (Huang et al. 2024, 2403.17031, "The N+ implementation details of RLHF with PPO")."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.05
    advantage: AdvantageEstimator = field(default_factory=lambda: Whitened(estimator=GAE()))


@dataclass(frozen=True, kw_only=True)
class RLOO(Algorithm):
    """REINFORCE on whole responses, each against the mean of the prompt's others (Ahmadian et al. 2024, 2402.14740)."""

    beta: float | KLController = 0.03
    advantage: AdvantageEstimator = BanditAdvantage(baseline=LeaveOneOut())
    surrogate: Surrogate = ImportanceSampling()


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Algorithm):
    """REINFORCE++: the reward-to-go of each token, whitened over the batch (Hu et al. 2025, 2501.03262)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.001
    advantage: AdvantageEstimator = field(default_factory=lambda: Whitened(estimator=RewardToGo()))
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class GRPO(Algorithm):
    """Advantages in units of the prompt's spread, the KL in the loss (Shao et al. 2024, 2402.03300, §4.1)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.04
    kl_term: ReferenceKL = KLInLoss(estimator=K3())
    advantage: AdvantageEstimator = GroupAdvantage()
    reduction: Reduction = SeqMeanTokenMean()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class DrGRPO(Algorithm):
    """GRPO without the spread, the mean over a response's length and the KL (Liu et al. 2025, 2503.20783, §3.2)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage(scale=NoScale())
    reduction: Reduction = SeqMeanTokenSumNorm()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class DAPO(Algorithm):
    """GRPO with dynamic sampling and a higher upper bound (Yu et al. 2025, 2503.14476, eqs. 8 and 13).

    The loss is a mean over all tokens, long responses pay a penalty, and there is no KL.
    """

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = Clip(epsilon=0.2, epsilon_high=0.28)
    shaping: Shaping | Sequence[Shaping] | None = SoftOverlong()
    dynamic_sampling: DynamicSampling | None = DynamicSampling()


@dataclass(frozen=True, kw_only=True)
class GSPO(Algorithm):
    """Clipping of the length-normalized ratio of whole responses (Zheng et al. 2025, 2507.18071, §4)."""

    level: ActionLevel = GeometricLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = Clip(epsilon=3e-4, epsilon_high=4e-4)
    reduction: Reduction = SeqMeanTokenSum()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class CISPOMethod(Algorithm):
    """Bound on the importance weight that keeps every token's gradient (MiniMax 2025, 2506.13585, §3.1)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = CISPO()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class LUSPO(Algorithm):
    """GSPO with each response's loss times its length, so that long ones are not held back (2026, 2602.05261)."""

    level: ActionLevel = GeometricTokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = Clip(epsilon=2e-3, epsilon_high=2.5e-3)
    reduction: Reduction = SeqMeanTokenSum()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class SAPOMethod(Algorithm):
    """GRPO with a smooth gate on each token's ratio instead of a clip (Gao et al. 2025, 2511.20347)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = SAPO()
    reduction: Reduction = SeqMeanTokenMean()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class VESPOMethod(Algorithm):
    """Smooth weight of each whole response for data that is off-policy (VESPO, 2026, 2602.10693).

    The loss is a sum over tokens by one constant; TRL divides by the number of tokens of the batch.
    """

    level: ActionLevel = SequenceLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage()
    surrogate: Surrogate = VESPO()
    reduction: Reduction = SeqMeanTokenSumNorm()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class MaxRL(Algorithm):
    """Maximum likelihood of success: each prompt in units of its pass rate (Tajwar et al. 2026, 2602.02710).

    For rewards of 0 and 1.
    """

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    advantage: AdvantageEstimator = GroupAdvantage(scale=GroupMean())
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class GDPO(Algorithm):
    """GRPO with every part of a `WeightedReward` normalized in its group before the sum (2026, 2601.05242)."""

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 0.0
    kl_term: ReferenceKL = KLInLoss(estimator=K3())
    advantage: AdvantageEstimator = PerReward()
    shaping: Shaping | Sequence[Shaping] | None = ()


@dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation(Algorithm):
    """Reverse KL to a teacher on the student's own responses (Agarwal et al. 2024, 2306.13649; Lu 2025).

    The teacher stands in the reference's place, the reward is `ZeroReward`. `kl_term` is exact over the vocabulary;
    with `KLInReward` each token is learned from by its own −β·(log π_old − log π_teacher), which needs no second pass
    of the teacher.
    """

    level: ActionLevel = TokenLevel()
    beta: float | KLController = 1.0
    kl_term: ReferenceKL = ExactKL()
    advantage: AdvantageEstimator = RewardToGo(gamma=0.0)
    surrogate: Surrogate = ImportanceSampling()
    shaping: Shaping | Sequence[Shaping] | None = ()
