"""One optimum, found twice: DPO on comparisons drawn from a reward, and PPO on that reward with a KL to the reference.

Both through the library's losses on the enumerated bandit of `test_core_bandit_theory`, in exact expectation: 2 prompts
of 9 responses, tabular logits. Rafailov et al. 2023, eq. 4 says where both end: π* ∝ π_ref·e^(r/β).
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_core_bandit_theory import BETA, FIXED, REF, apart, library_objective, library_tokens, optimum, sequence_logps

from lightning_rlhf.core import DPO, GAE, IPO, BanditAdvantage, Clip, KLPen, SequenceLevel, TokenLevel

PAIRS = torch.tensor([(x * 9 + i, x * 9 + j) for x in range(2) for i, j in product(range(9), repeat=2) if i != j])
BEST_FIRST = torch.tensor([[0, 1]])


def probabilities(theta):
    """π(y|x), (2, 9)."""
    return sequence_logps(theta, FIXED).exp().view(2, 9)


def total_variation(a, b):
    """The larger of both prompts, ½ Σ_y |π_a − π_b|."""
    return float(0.5 * (probabilities(a) - probabilities(b)).abs().sum(1).max())


def log_ratios(theta):
    """h of the 18 responses, by the library's log-probs."""
    difference = library_tokens(theta, FIXED) - library_tokens(REF, FIXED)
    return SequenceLevel().total(difference, FIXED.response).squeeze(1)


def expected_loss(loss, theta, scores):
    """E over prompts, pairs drawn from π_ref, and labels drawn by Bradley and Terry: P(i beats j) = σ(r_i − r_j)."""
    drawn = 0.5 * sequence_logps(REF, FIXED).exp()[PAIRS].prod(1)
    wins = torch.sigmoid(scores[PAIRS[:, 0]] - scores[PAIRS[:, 1]])
    return (drawn * wins * loss(log_ratios(theta)[PAIRS], BEST_FIRST.expand(len(PAIRS), 2))).sum()


def directly(loss, scores=FIXED.scores):
    """Minimize the expected loss from π_ref."""
    theta = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = expected_loss(loss, theta, scores)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


def by_ppo(beta=BETA, *, rounds=700, scores=FIXED.scores, **settings):
    """Maximize the surrogate of rounds of two steps each from π_ref, expectations over π_old."""
    theta = REF.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, rounds)
    rows = FIXED._replace(scores=scores)
    for _ in range(rounds):
        old = theta.detach().clone()
        for _ in range(2):
            optimizer.zero_grad()
            (-library_objective(theta, rows, old=old, beta=beta, **settings)).backward()
            optimizer.step()
        schedule.step()
    return theta.detach()


SEQUENCE = {"level": SequenceLevel(), "estimator": BanditAdvantage()}
TOKENS = {"level": TokenLevel(), "estimator": GAE(lam=1.0)}
PPO = [SEQUENCE | {"surrogate": Clip(epsilon=0.2)}, TOKENS | {"surrogate": Clip(epsilon=0.2)}]
PPO += [SEQUENCE | {"surrogate": KLPen(coef=1.0, target=None)}]


@pytest.fixture(scope="module")
def by_dpo():
    return directly(DPO(beta=BETA))


@pytest.mark.parametrize("settings", PPO, ids=["bandit", "tokens", "klpen"])
def test_dpo_and_ppo_end_at_one_policy(by_dpo, settings):
    best, _ = optimum(FIXED)
    found = by_ppo(**settings)
    assert total_variation(by_dpo, best) < 1e-6
    assert total_variation(found, best) < 1e-3
    assert total_variation(found, by_dpo) < 1e-3
    assert total_variation(REF, best) > 0.3  # there was a way to go


def test_another_beta_of_either_ends_elsewhere(by_dpo):
    """Negative control: each then ends at the optimum of its own β, and not at the other's."""
    other = directly(DPO(beta=2 * BETA))
    assert total_variation(other, optimum(FIXED, 2 * BETA)[0]) < 1e-6
    assert total_variation(other, by_dpo) > 0.1
    found = by_ppo(2 * BETA, **SEQUENCE)
    assert total_variation(found, other) < 1e-3
    assert total_variation(found, by_dpo) > 0.1


def test_comparisons_of_another_reward_end_elsewhere(by_dpo):
    """Negative control: the labels of the flipped reward, and those of twice the reward."""
    for scale in (-1.0, 2.0):
        other = directly(DPO(beta=BETA), scale * FIXED.scores)
        assert total_variation(other, optimum(FIXED, BETA / scale)[0]) < 1e-6
        assert total_variation(other, by_dpo) > 0.1


def test_a_constant_per_prompt_is_no_preference(by_dpo):
    """Comparisons do not see it, and the optimum of PPO does not either."""
    shifted = FIXED.scores + torch.tensor([5.0, -3.0], dtype=torch.float64)[FIXED.prompt]
    assert total_variation(directly(DPO(beta=BETA), shifted), by_dpo) < 1e-6


def test_implicit_reward_is_the_reward_up_to_a_constant_per_prompt(by_dpo):
    """Rafailov et al. 2023, eq. 5: β·h = r − β·log Z(x)."""
    constant = (BETA * log_ratios(by_dpo) - FIXED.scores).view(2, 9)
    assert apart(constant, constant.mean(1, keepdim=True).expand(2, 9)) < 1e-5
    assert float((constant[0] - constant[1]).abs().max()) > 0.01  # of each prompt its own


@pytest.mark.parametrize("loss", [DPO(beta=BETA, label_smoothing=0.1), IPO(beta=BETA)], ids=["smoothed", "ipo"])
def test_losses_of_another_model_of_preferences_end_elsewhere(by_dpo, loss):
    """Negative control: the logistic loss without smoothing is the likelihood of Bradley and Terry, and no other is."""
    found = directly(loss)
    assert total_variation(found, by_dpo) > 0.02


def test_ipo_ends_where_its_own_theorem_says():
    """Azar et al. 2023, eq. 7 with Ψ the identity: π ∝ π_ref·exp(p(y beats μ)/τ), μ = π_ref the source of the pairs."""
    tau = 0.3
    reference = probabilities(REF)
    wins = torch.sigmoid(FIXED.scores.view(2, 9, 1) - FIXED.scores.view(2, 1, 9))
    preference = (wins * reference.unsqueeze(1)).sum(2)
    expected = (reference.log() + preference / tau).softmax(1)
    found = probabilities(directly(IPO(beta=tau)))
    assert float(0.5 * (found - expected).abs().sum(1).max()) < 1e-6
    assert float(0.5 * (found - (reference.log() + preference / (2 * tau)).softmax(1)).abs().sum(1).max()) > 0.02
