"""Objects of every kind with each other through `PPOModule` and `Trainer`: what is accepted trains, to the end."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from gathered import gathered

from lightning_rlhf.core import (
    CISPO,
    K2,
    K3,
    AdaptiveKL,
    BanditAdvantage,
    BatchMean,
    Clip,
    ConstantSchedule,
    FixedKL,
    GeometricLevel,
    GroupAdvantage,
    ImportanceSampling,
    KLInLoss,
    KLInReward,
    KLPen,
    LeaveOneOut,
    MaskedIS,
    NoScale,
    RewardToGo,
    RunningMean,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SeqMeanTokenSumNorm,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    TruncatedIS,
    Whitened,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rollout import UpdateSchedule

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]]
ENDS = list(range(10))  # any of these ends a response, so that lengths are ragged
LEVELS = [TokenLevel(), SequenceLevel(), GeometricLevel()]
TERMS = [KLInReward()] + [KLInLoss(estimator=k, level=at) for k in (K2(), K3()) for at in (None, *LEVELS[:2])]
CONTROLLERS = [FixedKL(coef=0.3), AdaptiveKL(coef=0.3, target=1e-3, horizon=50.0)]
SURROGATES = [
    Clip(epsilon=3e-4, epsilon_high=4e-4),
    KLPen(coef=1.0, target=None),
    KLPen(coef=1.0, target=1e-3),
    ImportanceSampling(),
    CISPO(largest=1.01),
    TruncatedIS(surrogate=Clip(epsilon=3e-4, epsilon_high=4e-4, dual=1.01)),
    MaskedIS(surrogate=ImportanceSampling()),
]
ADVANTAGES = [
    BanditAdvantage(),
    BanditAdvantage(baseline=BatchMean()),
    BanditAdvantage(baseline=RunningMean()),
    BanditAdvantage(baseline=LeaveOneOut()),
    GroupAdvantage(),
    GroupAdvantage(scale=NoScale()),
    RewardToGo(),
    Whitened(estimator=RewardToGo()),
]
REDUCTIONS = [TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean(), SeqMeanTokenSumNorm(length=3)]


@pytest.fixture
def trained(make_lm, token_reward, make_trainer, as_loader, left_padded, recorder):
    """Two rollouts of two responses to each prompt; the module, what it logged, how far its weights moved."""

    def run(**options):
        network = make_lm("gpt2", end=ENDS, n_layer=1).double()
        module = PPOModule(
            **gathered(
                policy=network,
                reward=token_reward(),
                generation=SamplingParams(max_new_tokens=4, samples_per_prompt=2),
                updates=UpdateSchedule(epochs=2, minibatch=4, max_grad_norm=None),
                shaping=(),
                optimizer=partial(torch.optim.SGD, lr=0.01),
                schedule=ConstantSchedule(),
                **options,
            )
        )
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        make_trainer(callbacks=[recorder]).fit(module, as_loader([{"prompts": left_padded(PROMPTS)}] * 2))
        after = torch.cat([p.detach().flatten() for p in module.policy.network.parameters()])
        steps = recorder.steps[-2:]
        assert all(math.isfinite(number) for step in steps for number in step.values())
        return module, steps, float((after.double() - before.double()).abs().max())

    return run


@pytest.mark.parametrize("level", LEVELS, ids=repr)
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_kl_fixed_or_adaptive_in_reward_or_loss_runs_at_every_level(trained, level, term):
    """β moves where it adapts and nowhere else; the KL is charged in one place."""
    for kl in CONTROLLERS:
        module, steps, moved = trained(level=level, beta=kl, kl_term=term, surrogate=SURROGATES[0])
        assert moved > 1e-6
        assert (module.algorithm.kl.coef == 0.3) == isinstance(kl, FixedKL)
        in_loss = isinstance(term, KLInLoss)
        assert (steps[-1]["loss/kl_avg"] > 0) == in_loss
        assert (steps[-1]["objective/non_score_reward"] != 0) == (not in_loss)


PAIRS = [(s, level) for s, level in product(SURROGATES, LEVELS) if not (isinstance(s, KLPen) and level == LEVELS[2])]


@pytest.mark.parametrize(("surrogate", "level"), PAIRS, ids=repr)
def test_surrogate_runs_at_every_level_under_every_advantage_and_reduction(trained, surrogate, level):
    """Every surrogate meets every advantage at some level, and every reduction at each."""
    shift = SURROGATES.index(surrogate) + LEVELS.index(level)
    for i, advantage in enumerate(ADVANTAGES[shift % 2 :: 2]):
        reduction = REDUCTIONS[(i + shift // 2) % len(REDUCTIONS)]
        module, steps, moved = trained(surrogate=surrogate, level=level, advantage=advantage, reduction=reduction)
        assert moved > 1e-6, (advantage, reduction)
        adapts = surrogate.adaptive
        assert (module.algorithm.surrogate != surrogate) == adapts
        assert ("policy/kl_old" in steps[-1]) == adapts


def test_levels_and_reductions_leave_other_weights_behind(trained):
    """Negative control: the runs above are not all one run."""
    found = {
        (repr(level), repr(reduction)): round(
            trained(level=level, reduction=reduction, surrogate=ImportanceSampling())[2], 12
        )
        for level, reduction in product(LEVELS, (SeqMeanTokenMean(), SeqMeanTokenSumNorm(length=3)))
    }
    assert len(set(found.values())) == len(found)
