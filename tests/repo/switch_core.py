"""Switches of the mathematics: every object on one grid of random numbers, in float64."""

from __future__ import annotations

from typing import Any

import torch
from switch_harness import Table, case, to
from torch import Tensor

from lightning_rlhf.core import (
    CISPO,
    DPO,
    GAE,
    IPO,
    K3,
    KTO,
    SAPO,
    VESPO,
    AdaptiveEntropy,
    AdaptiveKL,
    AdvantageEstimator,
    Algorithm,
    BanditAdvantage,
    Baseline,
    BatchMean,
    BatchStd,
    Centered,
    Clip,
    ClippedValueLoss,
    ClipScore,
    Combination,
    ConstantSchedule,
    CosineSchedule,
    DirectPreferenceLoss,
    DPPOMask,
    EntropyBonus,
    FixedKL,
    GroupAdvantage,
    GroupScale,
    GroupStd,
    ImportanceSampling,
    KLController,
    KLInLoss,
    KLPen,
    LengthNormalized,
    LengthPenalty,
    LinearSchedule,
    LossMask,
    MaskedIS,
    MissingEOSPenalty,
    NoCorrection,
    NoScale,
    OffPolicyMask,
    PerReward,
    PlackettLuce,
    PreferenceLoss,
    RankingLoss,
    Reduction,
    ReferenceKL,
    RewardToGo,
    RunningMean,
    RunningNormalized,
    Schedule,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    Shaping,
    SoftOverlong,
    Surrogate,
    TokenLevel,
    TopEntropy,
    TruncatedIS,
    TruncatedScore,
    UncertaintyWeighted,
    ValueLoss,
    Whitened,
    local,
    penalized_rewards,
)
from lightning_rlhf.types import Rollout

_GENERATOR = torch.Generator().manual_seed(0)
X, Y, Z = torch.randn(3, 6, 4, generator=_GENERATOR, dtype=torch.float64)
LENGTHS = torch.tensor([4, 2, 1, 3, 4, 2])
MASK = torch.arange(4) < LENGTHS.unsqueeze(1)
ENDED = torch.tensor([True, False, True, False, True, True])
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
RANK = torch.tensor([[0, 1, 2, -1], [0, 0, 1, -1], [3, 2, 1, 0]] * 2)


def _with_gradient(loss: Tensor, x: Tensor) -> list[Tensor]:
    return [loss, *torch.autograd.grad(loss.sum(), x)]


def loss(surrogate: Surrogate) -> list[Tensor]:
    log_ratio = X.clone().requires_grad_()
    return _with_gradient(surrogate(log_ratio, Y).loss, log_ratio)


def weights(surrogate: Surrogate) -> Tensor:
    return surrogate.weights(X, Y, MASK, TokenLevel()).applied


def sampler_ratios(surrogate: Surrogate) -> Tensor:
    return surrogate.weights(X, Y, MASK, TokenLevel()).ratio


def later_loss(surrogate: Surrogate) -> list[list[Tensor]]:
    """After rollouts that stayed near π_old, and that left it."""
    return [loss(surrogate.adapted(kl_old)) for kl_old in (1e-4, 0.1)]


def advantages(estimator: AdvantageEstimator) -> Any:
    return estimator(torch.where(MASK, X, 0.0), Y, MASK, groups=GROUPS, all_sum=local)


def baselines(baseline: Baseline) -> list[Tensor]:
    """In three rollouts, the mean reward of the first two known to the next."""
    found = []
    for mean in (0.7, -1.3, 0.2):
        found.append(baseline(X[:, 0], Y[:, 0], groups=GROUPS, all_sum=local))
        baseline = baseline.adapted(mean)
    return found


def unit(scale: GroupScale) -> Tensor:
    return scale(X[:, 0], GROUPS, local)


def shaped(rule: Shaping) -> Tensor:
    return rule(X[:, 0], lengths=LENGTHS, ended=ENDED)


def combined(combination: Combination) -> Tensor:
    return combination(X)


def charged(kl: KLController) -> Tensor:
    return penalized_rewards(X[:, 0], Y, MASK, coef=kl.coef)


def prices(bonus: EntropyBonus) -> list[float]:
    """Before any rollout, and after rollouts of falling and rising entropy."""
    found = [bonus.price]
    for entropy in [*(0.9 - 0.05 * i for i in range(16)), *(0.1 * i for i in range(1, 10))]:
        bonus = bonus.adapted(entropy)
        found.append(bonus.price)
    return found


def charged_later(kl: KLController) -> list[Tensor]:
    """After a KL of 1 nat, and of 5."""
    return [charged(kl.adapted(nats, 100)) for nats in (1.0, 5.0)]


def kl_losses(term: ReferenceKL) -> list[Tensor]:
    return [term.in_loss(X, Y, Z, MASK, level) for level in (TokenLevel(), SequenceLevel())]


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step, 10) for step in range(12)]


def reduced(reduction: Reduction) -> Tensor:
    return reduction.total(X, MASK) / reduction.count(MASK)


def kept(mask: LossMask) -> Tensor:
    rollout = Rollout(
        tokens=torch.zeros(6, 5, dtype=torch.int64),
        attention_mask=torch.ones(6, 5, dtype=torch.bool),
        response_mask=MASK,
        ended=ENDED,
        prompt_index=GROUPS,
        logprobs=Y,
        sampler_logprobs=-Y.abs(),
        ref_logprobs=Y,
        entropy=Z.abs(),
        values=Z,
    )
    algorithm = Algorithm(level=TokenLevel(), masks=mask)
    experience = algorithm.credit(rollout, X[:, 0])
    return algorithm.action_loss(-X.abs(), None, experience).stats["policy/masked"]


def preference(loss: PreferenceLoss) -> list[Tensor]:
    scores = X.clone().requires_grad_()
    return _with_gradient(loss(scores, RANK, Y), scores)


def directly(loss: DirectPreferenceLoss) -> list[Tensor]:
    ratios = X.clone().requires_grad_()
    return _with_gradient(loss(ratios, RANK, Y.abs().mean()), ratios)


def value(loss: ValueLoss) -> list[Tensor]:
    values = X.clone().requires_grad_()
    return _with_gradient(loss(values, Y, Z).loss, values)


TABLE: Table = {
    AdaptiveEntropy: case(
        prices,
        {"coef": 0.02},
        coef=to(0.1),
        target=to(0.7),
        step=to(0.1),
        smallest=to(0.02),
        largest=to(0.004),
        entropy=to(0.1),
    ),
    EntropyBonus: case(prices, coef=to(0.1)),
    AdaptiveKL: case(charged_later, coef=to(0.3, by=charged), target=to(3.0), horizon=to(5_000.0)),
    BanditAdvantage: case(advantages, baseline=to(BatchMean())),
    BatchStd: case(unit, guard=to(0.1)),
    CISPO: case(loss, largest=to(1.2), smallest=to(0.8)),
    Centered: case(preference, loss=to(PlackettLuce()), coef=to(0.1)),
    Clip: case(loss, epsilon=to(0.1), epsilon_high=to(0.5), dual=to(1.1)),
    ClipScore: case(shaped, low=to(-0.1), high=to(0.1)),
    ClippedValueLoss: case(value, epsilon=to(0.5), coef=to(1.0)),
    ConstantSchedule: case(factors, warmup=to(4), warmup_start=to(0.5, warmup=4)),
    SeqMeanTokenSumNorm: case(reduced, {"length": 8}, length=to(16)),
    CosineSchedule: case(factors, warmup=to(4), warmup_start=to(0.5, warmup=4), floor=to(0.5)),
    DPO: case(directly, beta=to(0.2), label_smoothing=to(0.1)),
    DPPOMask: case(kept, threshold=to(0.5)),
    FixedKL: case(charged, coef=to(0.1)),
    PerReward: case(advantages, estimator=to(BanditAdvantage()), scale=to(NoScale())),
    RunningNormalized: case(
        shaped,
        {"squares": 4.0, "count": 9.0, "mean": 0.5},
        center=to(False),
        mean=to(1.0),
        squares=to(9.0),
        count=to(5.0),
    ),
    GAE: case(advantages, gamma=to(0.9), lam=to(0.5)),
    GroupAdvantage: case(advantages, scale=to(NoScale())),
    GroupStd: case(unit, guard=to(0.1)),
    IPO: case(directly, beta=to(0.2)),
    KTO: case(directly, beta=to(0.2), desirable=to(2.0), undesirable=to(0.5)),
    KLInLoss: case(kl_losses, estimator=to(K3()), level=to(SequenceLevel()), unbiased=to(True, estimator=K3())),
    KLPen: case(loss, coef=to(0.5), target=to(0.5, by=later_loss)),
    LengthNormalized: case(shaped, length=to(3.0)),
    LengthPenalty: case(shaped, {"coef": 0.1}, coef=to(0.2)),
    LinearSchedule: case(factors, warmup=to(4), warmup_start=to(0.5, warmup=4), floor=to(0.5)),
    MaskedIS: case(
        weights,
        surrogate=to(ImportanceSampling(), by=loss),
        level=to(SequenceLevel()),
        smallest=to(0.9),
        largest=to(1.1),
    ),
    OffPolicyMask: case(kept, {"threshold": 0.5}, threshold=to(0.05)),
    RankingLoss: case(preference, margin=to(0.5)),
    TruncatedScore: case(shaped, value=to(0.0)),
    RewardToGo: case(advantages, gamma=to(0.9)),
    RunningMean: case(baselines, {"weight": 0.3}, decay=to(0.5), mean=to(0.7), weight=to(0.6, mean=0.7)),
    SAPO: case(loss, temperature_positive=to(2.0), temperature_negative=to(2.0)),
    SoftOverlong: case(shaped, {"limit": 4, "buffer": 2}, limit=to(3), buffer=to(3), penalty=to(2.0)),
    NoCorrection: case(sampler_ratios, surrogate=to(ImportanceSampling(), by=loss), level=to(SequenceLevel())),
    MissingEOSPenalty: case(shaped, penalty=to(2.0)),
    TopEntropy: case(kept, share=to(0.5)),
    TruncatedIS: case(weights, surrogate=to(ImportanceSampling(), by=loss), level=to(SequenceLevel()), cap=to(1.1)),
    UncertaintyWeighted: case(combined, coef=to(0.5)),
    VESPO: case(loss, k_positive=to(1.0), lambda_positive=to(1.0), k_negative=to(1.0), lambda_negative=to(1.0)),
    Whitened: case(advantages, estimator=to(RewardToGo())),
}
