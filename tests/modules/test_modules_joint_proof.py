"""One optimum, found twice by networks: PreferenceModule on comparisons and PPOModule on the reward behind them.

The bandit is that of `test_modules_bandit_exact`: 2 prompts of 21 responses. A response has a whole number w as its
weight and log w as its reward, so that of w_i + w_j comparisons of two responses w_i are won by the first: the file
holds what infinitely many draws of Bradley and Terry's model would. Rafailov et al. 2023, eq. 4 says where both
modules end: π* ∝ π_ref·w^(1/β).
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from test_modules_bandit_exact import BETA, PROMPTS, RESPONSES, VOCAB, enumerated_logprobs
from test_modules_bandit_exact import make_module as make_ppo

from lightning_rlhf.core import DPO, IPO, Clip, LinearSchedule
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PreferenceModule
from lightning_rlhf.types import ComparisonBatch

WEIGHTS = torch.randint(1, 5, (len(PROMPTS), len(RESPONSES)), generator=torch.Generator().manual_seed(3))
PAIRS = [(i, (i + step) % len(RESPONSES)) for i in range(len(RESPONSES)) for step in (1, 4)]
"""Enough to join all responses; with exact labels any such pairs have the same optimum."""
KIND = "gpt2"


def comparisons(weights: torch.Tensor) -> ComparisonBatch:
    """Each pair of responses w_i + w_j times, w_i times with the first as the better, the better one first."""
    texts = []
    for prompt, of_prompt in zip(PROMPTS, weights.tolist(), strict=True):
        for i, j in PAIRS:
            texts += [(prompt, RESPONSES[i], RESPONSES[j])] * of_prompt[i]
            texts += [(prompt, RESPONSES[j], RESPONSES[i])] * of_prompt[j]
    width = max(map(len, PROMPTS)) + max(map(len, RESPONSES))
    tokens = torch.zeros(len(texts), 2, width, dtype=torch.int64)
    mask, target = (torch.zeros(tokens.shape, dtype=torch.bool) for _ in range(2))
    for b, (prompt, *responses) in enumerate(texts):
        for k, response in enumerate(responses):
            length = len(prompt) + len(response)
            tokens[b, k, :length] = torch.tensor(prompt + response)
            mask[b, k, :length] = True
            target[b, k, len(prompt) : length] = True
    rank = torch.tensor([[0, 1]]).expand(len(texts), 2)
    return ComparisonBatch(tokens, mask, rank, torch.full(rank.shape, torch.nan), target=target)


@pytest.fixture
def reference(make_lm):
    return make_lm(KIND, vocab=VOCAB, width=16, initializer_range=0.15)


@pytest.fixture
def distance(reference):
    """Total variation of a policy from π*, ½ Σ_y |π − π*|, the larger of both prompts."""

    def of(network) -> float:
        with torch.no_grad():
            logp_ref = enumerated_logprobs(copy.deepcopy(reference).double().eval())
            logp = enumerated_logprobs(copy.deepcopy(network).double().eval())
        best = (logp_ref + WEIGHTS.double().log() / BETA).log_softmax(1)
        return float(0.5 * (logp.exp() - best.exp()).abs().sum(1).max())

    return of


@pytest.fixture
def by_preferences(reference, make_trainer, as_loader, tmp_path):
    def train(loss, *, weights=WEIGHTS, steps=200):
        reference.save_pretrained(tmp_path / "reference")
        optimizer = partial(torch.optim.Adam, lr=0.02)
        source = ModelSource(path=str(tmp_path / "reference"))
        module = PreferenceModule(
            copy.deepcopy(reference), loss, reference=source, optimizer=optimizer, schedule=LinearSchedule()
        )
        make_trainer(max_epochs=1).fit(module, as_loader([comparisons(weights)] * steps))
        return module.model.network

    return train


@pytest.fixture
def by_ppo(reference, make_trainer, left_padded, as_loader):
    def train(*, rows=512, rollouts=60):
        table, schedule = WEIGHTS.double().log(), LinearSchedule()
        module = make_ppo(copy.deepcopy(reference), table, surrogate=Clip(), schedule=schedule, minibatch=256)
        prompts = left_padded([PROMPTS[i % 2] for i in range(rows)], rows=[{"prompt": i % 2} for i in range(rows)])
        make_trainer(max_epochs=1).fit(module, as_loader([{"prompts": prompts}] * rollouts))
        return module.policy.network

    return train


def test_preference_module_ends_at_the_optimum_of_the_reward(by_preferences, distance, reference):
    assert distance(reference) > 0.3
    assert distance(by_preferences(DPO(beta=BETA))) < 3e-3


@pytest.mark.slow
def test_ppo_module_ends_there_too(by_ppo, distance):
    """Up to the noise of 512 draws a rollout: 0.048 with 1,024 and 80 rollouts, 0.025 with 2,048 and 120."""
    assert distance(by_ppo()) < 0.1


@pytest.mark.parametrize("loss", [DPO(beta=2 * BETA), IPO(beta=BETA)], ids=["other_beta", "ipo"])
def test_another_loss_ends_elsewhere(by_preferences, distance, loss):
    assert distance(by_preferences(loss, steps=100)) > 0.05


def test_comparisons_of_another_reward_end_elsewhere(by_preferences, distance, reference):
    assert distance(by_preferences(DPO(beta=BETA), weights=5 - WEIGHTS, steps=100)) > distance(reference)
