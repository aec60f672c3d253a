from inspect import isabstract
from pathlib import Path

import pytest
import torch

from lightning_rlhf import core
from lightning_rlhf.core import (
    CISPO,
    DPO,
    GAE,
    IPO,
    K3,
    KTO,
    SAPO,
    VESPO,
    ActionLevel,
    AdvantageEstimator,
    BanditAdvantage,
    Baseline,
    BatchMean,
    BatchStd,
    Centered,
    Clip,
    ClippedValueLoss,
    ClipScore,
    Combination,
    DirectPreferenceLoss,
    ExactKL,
    GeometricLevel,
    GeometricTokenLevel,
    GroupAdvantage,
    GroupMean,
    GroupScale,
    GroupStd,
    ImportanceSampling,
    KLInLoss,
    KLInReward,
    KLPen,
    LearnedValue,
    LeaveOneOut,
    LengthNormalized,
    LengthPenalty,
    MaskedIS,
    MeanReward,
    MissingEOSPenalty,
    NoBaseline,
    NoCorrection,
    NoScale,
    PerReward,
    PlackettLuce,
    PreferenceLoss,
    RankingLoss,
    Reduction,
    ReferenceKL,
    RewardToGo,
    RunningMean,
    RunningNormalized,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    Shaping,
    SoftOverlong,
    SpanLevel,
    Surrogate,
    TokenLevel,
    TokenMean,
    TruncatedIS,
    TruncatedScore,
    UncertaintyWeighted,
    ValueLoss,
    Whitened,
    WorstReward,
    group_mean,
    group_std,
    group_sum,
    importance_ratio,
    k1,
    k2,
    k3,
    local,
    masked_mean,
    masked_sum,
    masked_variance,
    next_token_loss,
    penalized_rewards,
    token_logprobs,
    whiten,
)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
MASK = torch.arange(4) < torch.tensor([[4], [2], [1]])
TARGET = torch.cat([torch.zeros(3, 1, dtype=torch.bool), MASK], 1)
ROWS = torch.arange(3)
ENDED = torch.tensor([True, False, True])
RANK = torch.tensor([[0, 1, 2, -1], [0, 0, 1, -1], [3, 2, 1, 0]])
LENGTHS = torch.tensor([4, 2, 1])
GROUPS = torch.tensor([5, -2, 5])
PAIR = torch.tensor([5, 5, 5])


def shaping(rule):
    return lambda scores, lengths, ended: rule(scores, lengths=lengths, ended=ended), X[:, 0], LENGTHS, ENDED


def estimator(rule):
    return lambda r, v, m, g: rule(r, v, m, groups=g, all_sum=local), X, Y, MASK, PAIR


def baseline(rule):
    return lambda totals, values, g: rule(totals, values, groups=g, all_sum=local), X[:, 0], Y[:, 0], PAIR


def unit(scale):
    return lambda totals, g: scale(totals, g, local), X[:, 0], PAIR


def in_loss(term, level):
    return lambda logprobs, ref, sampler, m: term.in_loss(logprobs, ref, sampler, m, level), X, Y, Z, MASK


def weights(surrogate):
    return lambda old, sampler, m: surrogate.weights(old, sampler, m, TokenLevel()), X, Y, MASK


CALLS = {
    "masked_sum": (masked_sum, X, MASK),
    "masked_mean": (masked_mean, X, MASK),
    "masked_variance": (masked_variance, X, MASK),
    "whiten": (whiten, X, MASK),
    "token_logprobs": (token_logprobs, X, ROWS),
    "importance_ratio": (importance_ratio, X),
    "group_sum": (group_sum, X[:, 0], GROUPS),
    "group_mean": (group_mean, X[:, 0], GROUPS),
    "group_std": (group_std, X[:, 0], GROUPS),
    "k1": (k1, X),
    "k2": (k2, X),
    "k3": (k3, X),
    "kl_in_reward": (KLInReward().in_reward, X),
    "kl_in_reward_loss": in_loss(KLInReward(), TokenLevel()),
    "kl_in_loss_reward": (KLInLoss().in_reward, X),
    "exact_kl": (lambda x, ref, sampler, m: ExactKL().in_loss(x, ref, sampler, m, TokenLevel(), x), X, Y, Z, MASK),
    "kl_in_loss": in_loss(KLInLoss(), TokenLevel()),
    "kl_in_loss_of_responses": in_loss(KLInLoss(estimator=K3(), level=SequenceLevel()), TokenLevel()),
    "kl_in_loss_unbiased": in_loss(KLInLoss(estimator=K3(), unbiased=True), TokenLevel()),
    "kl_in_loss_of_tokens": in_loss(KLInLoss(level=TokenLevel()), SequenceLevel()),
    "penalized_rewards": (lambda s, kl, m: penalized_rewards(s, kl, m, coef=0.1), X[:, 0], Y, MASK),
    "replace_score": shaping(TruncatedScore()),
    "subtract_from_score": shaping(MissingEOSPenalty()),
    "soft_overlong": shaping(SoftOverlong(limit=4, buffer=3)),
    "length_penalty": shaping(LengthPenalty(coef=0.1)),
    "length_normalized": shaping(LengthNormalized(length=3.0)),
    "running_normalized": shaping(RunningNormalized(mean=0.1, squares=9.0, count=4.0)),
    "clip_score": shaping(ClipScore(low=-0.1, high=0.1)),
    "mean_of": (MeanReward(), X),
    "worst_of": (WorstReward(), X),
    "uncertainty_weighted": (UncertaintyWeighted(), X),
    "token_level": (TokenLevel().log_ratio, X, Y, MASK),
    "sequence_level": (SequenceLevel().log_ratio, X, Y, MASK),
    "geometric_token_level": (GeometricTokenLevel().log_ratio, X, Y, MASK),
    "span_level": (SpanLevel().log_ratio, X, Y, MASK),
    "span_spread": (SpanLevel().spread, X, MASK),
    "span_state_value": (SpanLevel().state_value, X, MASK),
    "geometric_level": (GeometricLevel().log_ratio, X, Y, MASK),
    "state_value": (TokenLevel().state_value, X, MASK),
    "sequence_state_value": (SequenceLevel().state_value, X, MASK),
    "token_spread": (TokenLevel().spread, X, MASK),
    "sequence_spread": (SequenceLevel().spread, X[:, :1], MASK),
    "gae": estimator(GAE()),
    "reward_to_go": estimator(RewardToGo(gamma=0.9)),
    "bandit": estimator(BanditAdvantage()),
    "bandit_batch_mean": estimator(BanditAdvantage(baseline=BatchMean())),
    "bandit_leave_one_out": estimator(BanditAdvantage(baseline=LeaveOneOut())),
    "bandit_learned_value": estimator(BanditAdvantage(baseline=LearnedValue())),
    "whitened": estimator(Whitened(estimator=GAE())),
    "group_advantage": estimator(GroupAdvantage()),
    "group_advantage_batch_std": estimator(GroupAdvantage(scale=BatchStd())),
    "group_advantage_mean": (
        lambda r, v, m: GroupAdvantage(scale=GroupMean())(
            r.abs(), v, m, groups=torch.zeros_like(GROUPS), all_sum=local
        ),
        X,
        Y,
        MASK,
    ),
    "per_reward": estimator(PerReward()),
    "group_advantage_unscaled": estimator(GroupAdvantage(scale=NoScale())),
    "no_baseline": baseline(NoBaseline()),
    "batch_mean": baseline(BatchMean()),
    "leave_one_out": baseline(LeaveOneOut()),
    "running_mean": baseline(RunningMean(mean=0.1, weight=0.3)),
    "learned_value": baseline(LearnedValue()),
    "group_std_unit": unit(GroupStd()),
    "batch_std_unit": unit(BatchStd()),
    "unscaled_unit": unit(NoScale()),
    "clip": (Clip(), X, Y),
    "clip_with_every_bound": (Clip(epsilon=0.1, epsilon_high=0.3, dual=1.5), X, Y),
    "cispo": (CISPO(largest=1.2, smallest=0.8), X, Y),
    "unclipped": (lambda log_ratio, advantages: ImportanceSampling()(log_ratio, advantages).loss, X, Y),
    "kl_penalty": (KLPen(), X, Y),
    "sapo": (SAPO(), X, Y),
    "vespo": (VESPO(), X, Y),
    "plain_weights": weights(Clip()),
    "truncated_loss": (TruncatedIS(), X, Y),
    "truncated_weights": weights(TruncatedIS(cap=1.1)),
    "weights_of_responses": weights(TruncatedIS(level=SequenceLevel())),
    "no_correction": weights(NoCorrection()),
    "masked_loss": (MaskedIS(), X, Y),
    "masked_weights": weights(MaskedIS(surrogate=TruncatedIS(), smallest=0.7, largest=1.3)),
    "value_loss": (ClippedValueLoss(), X, Y, Z),
    "token_mean": (TokenMean().total, X, MASK),
    "sequence_mean": (SeqMeanTokenSum().total, X, MASK),
    "mean_of_means": (SeqMeanTokenMean().total, X, MASK),
    "constant_length": (SeqMeanTokenSumNorm(length=128).total, X, MASK),
    "ranking_loss": (RankingLoss(), X, RANK),
    "plackett_luce": (PlackettLuce(), X, RANK),
    "centered": (Centered(), X, RANK),
    "dpo": (DPO(), X, RANK),
    "ipo": (IPO(), X, RANK),
    "kto": (KTO(), X, RANK, torch.tensor(0.3)),
    "next_token_loss": (lambda x, t: next_token_loss(x, t, count=7), X, TARGET),
}


def floats(result):
    """Every float tensor of a result, tuples and dictionaries opened."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts for x in floats(part)]


@pytest.mark.parametrize("name", CALLS)
def test_arguments_stay_as_they_were_and_the_call_repeats(name):
    function, *arguments = CALLS[name]
    before = [x.clone() for x in arguments]
    first, again = floats(function(*arguments)), floats(function(*arguments))
    assert first
    for x, old in zip(arguments, before, strict=True):
        assert torch.equal(x, old)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_results_keep_the_dtype_of_their_arguments(name, dtype):
    function, *arguments = CALLS[name]
    cast = [x.to(dtype) if x.is_floating_point() else x for x in arguments]
    assert {x.dtype for x in floats(function(*cast))} == {dtype}


def test_every_callable_of_the_core_is_called_here():
    # a new surrogate, rule or term must join the table: its name stands in this file
    source = Path(__file__).read_text()
    rules = (Shaping, Combination, AdvantageEstimator, Baseline, GroupScale)
    terms = (Surrogate, Reduction, ActionLevel, ReferenceKL, ValueLoss, PreferenceLoss, DirectPreferenceLoss)
    classes = [x for x in vars(core).values() if isinstance(x, type) and issubclass(x, rules + terms)]
    missing = {x.__name__ for x in classes if not isabstract(x) and f"{x.__name__}(" not in source}
    assert missing <= {"MismatchIS"}
    assert len(classes) > 30
