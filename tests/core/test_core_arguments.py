import pytest
import torch

from lightning_rlhf.core import (
    GAE,
    BanditAdvantage,
    BatchMean,
    Clip,
    ClippedValueLoss,
    KLPenalty,
    RankingLoss,
    ReplaceScore,
    SequenceLevel,
    SequenceMean,
    SubtractFromScore,
    TokenLevel,
    TokenMean,
    Whitened,
    entropy,
    k1,
    k2,
    k3,
    local,
    masked_mean,
    masked_sum,
    masked_variance,
    next_token_loss,
    penalised_rewards,
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
WHITE = Whitened(estimator=GAE())
MEAN = BanditAdvantage(baseline=BatchMean())

CALLS = {
    "masked_sum": (masked_sum, X, MASK),
    "masked_mean": (masked_mean, X, MASK),
    "masked_variance": (masked_variance, X, MASK),
    "whiten": (whiten, X, MASK),
    "token_logprobs": (token_logprobs, X, ROWS),
    "entropy": (entropy, X),
    "k1": (k1, X),
    "k2": (k2, X),
    "k3": (k3, X),
    "penalised_rewards": (lambda s, kl, m: penalised_rewards(s, kl, m, coef=0.1), X[:, 0], Y, MASK),
    "replace_score": (ReplaceScore(), X[:, 0], ENDED),
    "subtract_from_score": (SubtractFromScore(), X[:, 0], ENDED),
    "token_level": (TokenLevel().log_ratio, X, Y, MASK),
    "sequence_level": (SequenceLevel().log_ratio, X, Y, MASK),
    "state_value": (TokenLevel().state_value, X, MASK),
    "gae": (lambda r, v, m: GAE()(r, v, m, groups=ROWS, all_sum=local), X, Y, MASK),
    "bandit": (lambda r, v, m: MEAN(r, v, m, groups=ROWS, all_sum=local), X, Y, MASK),
    "whitened": (lambda r, v, m: WHITE(r, v, m, groups=ROWS, all_sum=local), X, Y, MASK),
    "clip": (Clip(), X, Y),
    "kl_penalty": (KLPenalty(), X, Y),
    "value_loss": (ClippedValueLoss(), X, Y, Z),
    "token_mean": (TokenMean().total, X, MASK),
    "sequence_mean": (SequenceMean().total, X, MASK),
    "ranking_loss": (RankingLoss(), X, RANK),
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
