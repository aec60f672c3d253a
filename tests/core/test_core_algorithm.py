"""Eq. 2 as one value: its credit and loss by hand, what it refuses, and the published methods."""

import inspect
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightning_rlhf.core import (
    CISPO,
    DAPO,
    GAE,
    GRPO,
    GSPO,
    K3,
    LUSPO,
    RLOO,
    VESPO,
    AdaptiveKL,
    Algorithm,
    Clip,
    ClippedValueLoss,
    ClipScore,
    DrGRPO,
    FixedKL,
    GeometricLevel,
    GeometricTokenLevel,
    ImportanceSampling,
    KLInLoss,
    KLPen,
    MaskedIS,
    NoCorrection,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    SoftOverlong,
    TokenLevel,
    TruncatedIS,
    TruncatedScore,
    methods,
)
from lightning_rlhf.core.settings import described
from lightning_rlhf.types import Rollout

TIGHT = {"rtol": 0, "atol": 1e-12}


def a_rollout(**changes) -> Rollout:
    """Two responses to one prompt, of two tokens and of one."""
    response = torch.tensor([[True, True], [True, False]])
    numbers = {
        "logprobs": [[-1.0, -2.0], [-0.5, 0.0]],
        "sampler_logprobs": [[-1.0, -2.0], [-0.5, 0.0]],
        "ref_logprobs": [[-1.5, -1.0], [-0.75, 0.0]],
        "entropy": [[1.0, 1.0], [1.0, 0.0]],
        "values": [[0.25, 0.5], [-0.25, 0.0]],
    }
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in numbers.items()}
    return Rollout(
        tokens=torch.tensor([[3, 1, 2], [3, 2, 0]]),
        attention_mask=torch.tensor([[True, True, True], [True, True, False]]),
        response_mask=response,
        ended=torch.tensor([True, False]),
        prompt_index=torch.tensor([0, 0]),
        **(tensors | changes),
    )


SCORES = torch.tensor([2.0, 1.0], dtype=torch.float64)


def test_bandit_is_charged_for_the_whole_response():
    """Â = r − β·Σ(log π_old − log π_ref): 2 − 0.1·(0.5 − 1) and 1 − 0.1·0.25."""
    experience = Algorithm(beta=0.1).credit(a_rollout(), SCORES)
    expected = torch.tensor([[2.05], [0.975]], dtype=torch.float64)
    torch.testing.assert_close(experience.advantages, expected, **TIGHT)
    torch.testing.assert_close(experience.rewards, expected, **TIGHT)
    torch.testing.assert_close(experience.penalties, expected - SCORES.unsqueeze(1), **TIGHT)


def test_token_level_charges_each_token_and_pays_at_the_end():
    experience = Algorithm(beta=0.1, level=TokenLevel()).credit(a_rollout(), SCORES)
    expected = torch.tensor([[-0.05, 2.1], [0.975, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(experience.rewards, expected, **TIGHT)


def test_loss_is_the_surrogate_plus_the_kl_in_the_loss_plus_the_value_loss():
    """By hand at ρ = e^0.1 for the first response, 1 for the second; V moved by 0.1 from 0.25 and −0.25."""
    logprobs = torch.tensor([[-0.9, -2.0], [-0.5, 0.0]], dtype=torch.float64)
    rollout = a_rollout()
    values = rollout.values + 0.1
    whole = Algorithm(
        beta=0.1, kl_term=KLInLoss(estimator=K3()), advantage=GAE(lam=1.0), value_loss=ClippedValueLoss(coef=0.5)
    )
    experience = whole.credit(rollout, SCORES)
    found = whole.action_loss(logprobs, values, experience)
    ratio = torch.tensor([[0.1], [0.0]], dtype=torch.float64).exp()
    advantages = torch.tensor([[2.0 - 0.25], [1.0 + 0.25]], dtype=torch.float64)
    torch.testing.assert_close(experience.advantages, advantages, **TIGHT)
    gap = torch.tensor([[0.6 - 1.0], [0.25]], dtype=torch.float64)  # Σ log π_θ − log π_ref
    k3 = (-gap).exp() - 1 + gap
    errors = torch.tensor([[2.0 - 0.35], [1.0 + 0.15]], dtype=torch.float64)
    expected = -ratio * advantages + 0.1 * k3 + 0.25 * errors.square()
    torch.testing.assert_close(found.loss, expected, **TIGHT)
    without = whole.action_loss(logprobs, None, experience)
    torch.testing.assert_close(without.loss, expected - 0.25 * errors.square(), **TIGHT)
    assert found.stats.keys() - without.stats.keys() == {"loss/value_avg", "value/clipfrac_avg"}


SAMPLER = torch.tensor([[-1.0, -3.0], [-0.5 + math.log(2), 0.0]], dtype=torch.float64)
"""Another log π_sampler than log π_old: w is 1 and e of the first response's tokens, ½ of the second's one."""


def test_weights_multiply_the_surrogate_loss_alone_and_are_logged():
    """w, min(w, 2) and whether they differ, of each action: tokens, whole responses, and responses' w on tokens."""
    e, tokens, responses = math.e, TokenLevel(), SequenceLevel()
    for level, at, ratio, applied, changed in (
        (tokens, None, [[1, e], [0.5, 1]], [[1, 2], [0.5, 1]], [[0, 1], [0, 0]]),
        (responses, None, [[e], [0.5]], [[2], [0.5]], [[1], [0]]),
        (tokens, responses, [[e, e], [0.5, 0.5]], [[2, 2], [0.5, 0.5]], [[1, 1], [0, 0]]),
    ):
        rollout = a_rollout(sampler_logprobs=SAMPLER)
        plain = Algorithm(level=level, kl_term=KLInLoss(), beta=0.1, surrogate=ImportanceSampling())
        weighted = replace(plain, surrogate=TruncatedIS(surrogate=ImportanceSampling(), level=at))
        experience = plain.credit(rollout, SCORES)
        without, found = (each.action_loss(rollout.logprobs, None, experience) for each in (plain, weighted))
        mask = experience.action_mask
        expected = {"sampler_ratio": ratio, "sampler_weight": applied, "sampler_truncated": changed}
        for name, rows in expected.items():
            stat = found.stats[f"policy/{name}"]
            torch.testing.assert_close(stat[mask], torch.tensor(rows, dtype=torch.float64)[mask], **TIGHT)
        square = found.stats["policy/sampler_ratio_square"]
        torch.testing.assert_close(square, found.stats["policy/sampler_ratio"].square(), **TIGHT)
        weights, kl = torch.tensor(applied, dtype=torch.float64), found.stats["loss/kl_avg"]
        torch.testing.assert_close(found.loss[mask], (weights * (without.loss - kl) + kl)[mask], **TIGHT)
        # without a correction nothing is weighed, and w is that of the actions
        assert without.stats["policy/sampler_weight"].unique().tolist() == [1.0]
        assert without.stats["policy/sampler_truncated"].unique().tolist() == [0.0]
        if at is None:
            assert torch.equal(without.stats["policy/sampler_ratio"], found.stats["policy/sampler_ratio"])
        # (B, T) each, as the mask: what is logged is a mean over actions
        assert {stat.shape for stat in found.stats.values()} == {mask.shape}


def test_external_engine_is_corrected_for_unless_it_was_decided():
    run = {"learned_reward": False, "max_new_tokens": 100}
    for surrogate in (Clip(), KLPen(coef=2.0)):
        algorithm = Algorithm(surrogate=surrogate, level=TokenLevel())
        assert algorithm.for_run(**run).surrogate == surrogate
        assert algorithm.for_run(**run, sampled_elsewhere=False).surrogate == surrogate
        corrected = algorithm.for_run(**run, sampled_elsewhere=True)
        assert corrected.surrogate == TruncatedIS(surrogate=surrogate, cap=2.0, level=None)
        assert corrected.for_run(**run, sampled_elsewhere=True) == corrected  # once
    for decided in (NoCorrection(surrogate=CISPO()), MaskedIS(), TruncatedIS(cap=5.0, level=SequenceLevel())):
        for elsewhere in (False, True):
            kept = Algorithm(surrogate=decided, level=TokenLevel()).for_run(**run, sampled_elsewhere=elsewhere)
            assert kept.surrogate == decided


def test_no_correction_gives_the_loss_of_its_surrogate():
    rollout = a_rollout(sampler_logprobs=SAMPLER)
    losses = {}
    for surrogate in (Clip(), NoCorrection(surrogate=Clip()), TruncatedIS(surrogate=Clip())):
        algorithm = Algorithm(surrogate=surrogate)
        losses[surrogate] = algorithm.action_loss(rollout.logprobs, None, algorithm.credit(rollout, SCORES)).loss
    plain, none, truncated = losses.values()
    assert torch.equal(plain, none)
    assert not torch.equal(plain, truncated)  # negative control


def test_beta_is_a_number_or_what_adapts():
    means = {"objective/kl": 60.0, "objective/rlhf_reward": 1.0, "policy/entropy_avg": 1.0}
    means |= {"objective/raw_scores": 1.0, "objective/raw_scores_square": 2.0}
    assert Algorithm(beta=0.3).kl == FixedKL(coef=0.3)
    assert Algorithm(beta=AdaptiveKL(coef=0.3)).kl == AdaptiveKL(coef=0.3)
    assert Algorithm(beta=0.3).with_beta(0.5) == Algorithm(beta=0.5)
    raised = Algorithm(beta=AdaptiveKL(coef=0.3, target=2.0)).with_beta(0.5)
    assert raised.beta == AdaptiveKL(coef=0.5, target=2.0)
    assert Algorithm(beta=0.3, shaping=()).adapted(means, 8) == Algorithm(beta=0.3, shaping=())


def test_number_and_fixed_controller_are_one_setting_of_a_run():
    number, controller = described(Algorithm(beta=0.3)), described(Algorithm(beta=FixedKL(coef=0.3)))
    assert number == controller
    assert number["beta"] == {"class": "FixedKL", "coef": 0.3}
    assert described(Algorithm(beta=0.4)) != number


def test_shaping_that_was_not_chosen_is_the_rewards():
    run = {"max_new_tokens": 100}
    assert Algorithm().for_run(learned_reward=True, **run).rules == (TruncatedScore(),)
    assert Algorithm().for_run(learned_reward=False, **run).rules == ()
    assert Algorithm(shaping=()).for_run(learned_reward=True, **run).rules == ()
    assert Algorithm(shaping=ClipScore(high=2.0)).for_run(learned_reward=True, **run).rules == (ClipScore(high=2.0),)


def test_lengths_that_were_not_chosen_are_the_longest_response():
    dapo = DAPO().for_run(learned_reward=False, max_new_tokens=100)
    assert dapo.rules == (SoftOverlong(limit=100, buffer=20),)
    assert DAPO().for_run(learned_reward=False, max_new_tokens=20480).rules == (SoftOverlong(limit=20480, buffer=4096),)
    of_drgrpo = DrGRPO().for_run(learned_reward=False, max_new_tokens=100)
    assert of_drgrpo.reduction == SeqMeanTokenSumNorm(length=100)
    scores = torch.zeros(3, dtype=torch.float64)
    lengths, ended = torch.tensor([80, 90, 100]), torch.tensor([True, True, False])
    assert dapo.shaped(scores, lengths=lengths, ended=ended).tolist() == [0.0, -0.5, -1.0]
    for unset in (SoftOverlong(), SoftOverlong(limit=5)):
        with pytest.raises(ValueError, match="`SoftOverlong` needs"):
            unset(scores, lengths=lengths, ended=ended)
    with pytest.raises(ValueError, match="`SeqMeanTokenSumNorm` needs"):
        SeqMeanTokenSumNorm().total(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beta": -0.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"ptx_coef": -1.0}, "ptx_coef"),
        ({"value_loss": ClippedValueLoss()}, "value_loss"),
        ({"level": GeometricLevel(), "surrogate": KLPen()}, "GeometricLevel"),
        ({"level": GeometricLevel(), "surrogate": MaskedIS(surrogate=KLPen())}, "GeometricLevel"),
        ({"level": GeometricTokenLevel(), "surrogate": KLPen()}, "GeometricTokenLevel"),
        ({"level": GeometricLevel(), "surrogate": VESPO()}, "which GeometricLevel does not give"),
        ({"level": TokenLevel(), "surrogate": TruncatedIS(surrogate=VESPO())}, "which TokenLevel does not give"),
    ],
)
def test_what_cannot_be_is_refused_when_built(options, named):
    with pytest.raises(ValueError, match=named):
        Algorithm(**options)
    with pytest.raises(ValueError, match=named):
        replace(Algorithm(), **options)


METHODS = [cls for cls in vars(methods).values() if inspect.isclass(cls) and Algorithm in cls.__mro__[1:]]


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
def test_methods_change_defaults_and_nothing_else(method):
    own = {name for name in vars(method) if not name.startswith("__")}
    assert own <= {"level", "beta", "kl_term", "advantage", "surrogate", "reduction", "shaping", "ptx_coef"} | {
        "dynamic_sampling"
    }
    assert method(beta=0.5).kl.coef == 0.5
    assert method() != Algorithm()
    assert any(character.isdigit() for character in method.__doc__)  # names its paper


def test_methods_have_the_numbers_of_their_papers():
    assert (GRPO().kl.coef, GRPO().kl_term) == (0.04, KLInLoss(estimator=K3()))
    assert (GSPO().surrogate.epsilon, GSPO().surrogate.epsilon_high) == (3e-4, 4e-4)
    assert (DAPO().surrogate.epsilon, DAPO().surrogate.epsilon_high, DAPO().kl.coef) == (0.2, 0.28, 0.0)
    assert RLOO().advantage.needs_group
    assert (LUSPO().surrogate, LUSPO().kl.coef) == (Clip(epsilon=2e-3, epsilon_high=2.5e-3), 0.0)


def test_algorithm_needs_torch_alone():
    """Neither Lightning nor transformers is loaded by who computes a loss."""
    program = (
        "import sys; from lightning_rlhf.core import GRPO; GRPO(); "
        "assert not {'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
