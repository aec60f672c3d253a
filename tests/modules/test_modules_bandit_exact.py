"""A bandit small enough to enumerate, through PPOModule and Trainer: does it reach β·log Z?"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from gathered import gathered

from lightning_rlhf.core import (
    BanditAdvantage,
    Clip,
    ConstantSchedule,
    FixedKL,
    KLPen,
    LinearSchedule,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
)
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Reward, Scores
from lightning_rlhf.rollout import UpdateSchedule
from lightning_rlhf.types import Experience, Rollout

VOCAB, LENGTH, BETA = 5, 2, 0.6
PROMPTS = [[2, 3, 1], [4, 2]]  # two tokens at least: without positions of its own, Llama cannot tell "4" from "4 4"
# every response of at most two tokens: 0 ends it
RESPONSES = [[0]] + [[a, 0] for a in range(1, VOCAB)] + [[a, b] for a in range(1, VOCAB) for b in range(1, VOCAB)]


def score_table(flip: float = 1.0) -> torch.Tensor:
    """One score for each prompt and response, (2, 21)."""
    drawn = torch.randn(len(PROMPTS), len(RESPONSES), generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return flip * (drawn - drawn.mean(1, keepdim=True))


class TableReward(Reward):
    """Looks the score up by prompt and response."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.place = {tuple(response): i for i, response in enumerate(RESPONSES)}

    def __call__(self, rollout: Rollout, rows) -> torch.Tensor:
        drawn = rollout.tokens[:, rollout.prompt_width :].tolist()
        kept = [tuple(row[:length]) for row, length in zip(drawn, rollout.lengths.tolist(), strict=True)]
        return torch.stack([self.table[row["prompt"], self.place[text]] for row, text in zip(rows, kept, strict=True)])


def enumerated_logprobs(network) -> torch.Tensor:
    """log π(y|x) of every response, (2, 21), one unpadded forward pass at a time, by the plain transformers model."""
    table = []
    for prompt in PROMPTS:
        for response in RESPONSES:
            logits = network(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            table.append(sum(logits[i, token] for i, token in zip(at, response, strict=True)))
    return torch.stack(table).view(len(PROMPTS), len(RESPONSES))


def objective_value(logp: torch.Tensor, logp_ref: torch.Tensor, scores: torch.Tensor, beta: float) -> torch.Tensor:
    """J(π) = E[r] − β·KL(π‖π_ref), mean over the prompts."""
    return (logp.exp() * (scores - beta * (logp - logp_ref))).sum(1).mean()


def make_module(network, table, *, surrogate, lr=0.02, epochs=2, minibatch=64, beta=BETA, **options) -> PPOModule:
    return PPOModule(
        **gathered(
            policy=network,
            reward=TableReward(table),
            generation=SamplingParams(max_new_tokens=LENGTH),
            updates=UpdateSchedule(epochs=epochs, minibatch=minibatch, max_grad_norm=None),
            beta=FixedKL(coef=beta),
            surrogate=surrogate,
            shaping=(),
            optimizer=partial(torch.optim.Adam, lr=lr, eps=1e-8),
            **({"schedule": ConstantSchedule()} | options),
        )
    )


@pytest.fixture
def gap_closed(make_lm, make_trainer, left_padded, as_loader):
    """Trains; the share of the way from J(π_ref) to J* = β·log Z that was gone."""

    def run(kind="gpt2", *, rows=256, rollouts=25, flip=1.0, spread=0.15, **options) -> float:
        network = make_lm(kind, vocab=VOCAB, width=16, initializer_range=spread)
        scores = score_table()
        reference = copy.deepcopy(network).double().eval()
        module = make_module(network, score_table(flip), schedule=LinearSchedule(), **options)
        prompts = left_padded([PROMPTS[i % 2] for i in range(rows)], rows=[{"prompt": i % 2} for i in range(rows)])
        make_trainer(max_epochs=1).fit(module, as_loader([{"prompts": prompts}] * rollouts))
        with torch.no_grad():
            logp_ref = enumerated_logprobs(reference)
            logp = enumerated_logprobs(module.policy.network.eval())
        assert torch.allclose(logp.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-12)  # all responses
        best = BETA * (logp_ref + scores / BETA).logsumexp(1).mean()
        start = objective_value(logp_ref, logp_ref, scores, BETA)
        end = objective_value(logp, logp_ref, scores, BETA)
        assert end <= best + 1e-12
        return float((end - start) / (best - start))

    return run


KLPEN = KLPen(coef=1.0, target=None)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "surrogate"), [("gpt2", Clip()), ("llama", KLPEN)], ids=["clip", "klpen"])
def test_bandit_training_reaches_beta_log_z(gap_closed, kind, surrogate):
    assert gap_closed(kind, surrogate=surrogate) > 0.95


@pytest.mark.parametrize("surrogate", [Clip(), KLPEN], ids=["clip", "klpen"])
def test_bandit_training_on_flipped_scores_moves_away(gap_closed, surrogate):
    assert gap_closed(surrogate=surrogate, flip=-1.0, rollouts=8) < 0


@pytest.mark.parametrize("surrogate", [Clip(), KLPEN], ids=["clip", "klpen"])
def test_bandit_training_without_reference_kl_collapses(gap_closed, surrogate):
    assert gap_closed(surrogate=surrogate, beta=0.0) < 0.5


def every_response(module: PPOModule, network, reference) -> Rollout:
    """All responses to both prompts once, prompts padded on the left, as a rollout of `network`."""
    width = max(map(len, PROMPTS))
    tokens, attention, response = [], [], []
    for prompt in PROMPTS:
        for text in RESPONSES:
            pad, rest = width - len(prompt), LENGTH - len(text)
            tokens.append([0] * pad + prompt + text + [0] * rest)
            attention.append([False] * pad + [True] * (len(prompt) + len(text)) + [False] * rest)
            response.append([True] * len(text) + [False] * rest)
    tokens, attention, response = torch.tensor(tokens), torch.tensor(attention), torch.tensor(response)

    def token_logprobs(model):  # by row, from unpadded passes
        table = torch.zeros(response.shape, dtype=torch.float64)
        for i, (row, real) in enumerate(zip(tokens, attention, strict=True)):
            ids = row[real]
            count = int(response[i].sum())
            logits = model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
            for t in range(count):
                table[i, t] = logits[len(ids) - count + t - 1, ids[len(ids) - count + t]]
        return table

    with torch.no_grad():
        logprobs, ref_logprobs = token_logprobs(network), token_logprobs(reference)
    ended = torch.tensor([text[-1] == 0 for _ in PROMPTS for text in RESPONSES])
    return Rollout(
        tokens=tokens,
        attention_mask=attention,
        response_mask=response,
        ended=ended,
        prompt_index=torch.arange(len(tokens)),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=torch.zeros_like(logprobs),
        values=torch.zeros_like(logprobs),
    )


@pytest.fixture
def exact_setting(make_lm):
    """A policy that has left its reference, ready to differentiate, and the enumerated J's gradient."""

    def make(kind: str, surrogate, **options):
        network = make_lm(kind, vocab=VOCAB, seed=1, initializer_range=0.15)
        reference = make_lm(kind, vocab=VOCAB, seed=2, initializer_range=0.15).double().eval()
        module = make_module(network, score_table(), surrogate=surrogate, advantage=BanditAdvantage(), **options)
        module.configure_model()
        module.double()
        rollout = every_response(module, network.eval(), reference)
        logp = enumerated_logprobs(network)
        with torch.no_grad():
            logp_ref = enumerated_logprobs(reference)
        parameters = list(network.parameters())
        expected = torch.autograd.grad(objective_value(logp, logp_ref, score_table().double(), BETA), parameters)
        return module, rollout, logp.detach().exp().flatten(), parameters, expected

    return make


def gradient_of(module, experience: Experience, parameters):
    return torch.autograd.grad(module.objective.actions(module.algorithm, experience)[0], parameters)


def weighted(experience: Experience, weights: torch.Tensor) -> Experience:
    """Every row weighs π_old(y|x) / number of prompts: the surrogates are linear in a positive factor of Â."""
    factor = (weights / len(PROMPTS)).unsqueeze(1)
    return Experience(
        rollout=experience.rollout,
        action_mask=experience.action_mask,
        rewards=experience.advantages * factor,
        penalties=experience.advantages * factor,
        advantages=experience.advantages * factor,
        returns=experience.returns,
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("surrogate", [Clip(), KLPEN], ids=["clip", "klpen"])
@pytest.mark.parametrize("level", [SequenceLevel(), TokenLevel()], ids=["sequence", "token"])
def test_gradient_at_the_old_policy_is_that_of_the_objective(exact_setting, kind, surrogate, level):
    module, rollout, old, parameters, expected = exact_setting(
        kind, surrogate, level=level, reduction=SeqMeanTokenSum()
    )
    rows = [{"prompt": i} for i in range(2) for _ in RESPONSES]
    scores = TableReward(score_table())(rollout, rows)
    experience = module.credit(rollout, Scores(scores, {}))
    gradient = gradient_of(module, weighted(experience, old), parameters)
    tolerance = 1e-9 if kind == "gpt2" else 1e-5  # Llama's norm computes in float32 whatever its weights are
    for found, wanted in zip(gradient, expected, strict=True):  # the loss is −J
        assert torch.allclose(-found, wanted, rtol=0, atol=tolerance)
    assert max(float(g.abs().max()) for g in expected) > 1e-2


def test_gradient_with_the_penalty_left_out_is_not_that_of_the_objective(exact_setting):
    module, rollout, old, parameters, expected = exact_setting("gpt2", Clip(), beta=0.0)
    scores = TableReward(score_table())(rollout, [{"prompt": i} for i in range(2) for _ in RESPONSES])
    gradient = gradient_of(module, weighted(module.credit(rollout, Scores(scores, {})), old), parameters)
    assert max(float((f + e).abs().max()) for f, e in zip(gradient, expected, strict=True)) > 1e-2


def test_credit_is_the_score_less_beta_times_the_log_ratio(exact_setting):
    module, rollout, _, _, _ = exact_setting("gpt2", Clip())
    scores = torch.arange(float(len(rollout)), dtype=torch.float64)
    found = module.credit(rollout, Scores(scores, {})).advantages
    for i in range(len(rollout)):
        length = int(rollout.response_mask[i].sum())
        log_ratio = sum(float(rollout.logprobs[i, t] - rollout.ref_logprobs[i, t]) for t in range(length))
        assert float(found[i, 0]) == pytest.approx(i - BETA * log_ratio, abs=1e-12)


def test_penalty_gradient_in_expectation_is_that_of_the_exact_kl_to_the_old_policy(exact_setting, make_lm):
    """Away from π_old: E_old[∇(−ρÂ + b·k3)] = ∇(−E_θ[Â] + b·KL(π_old‖π_θ)), both enumerated."""
    b = 0.7
    module, rollout, old, parameters, _ = exact_setting("gpt2", KLPen(coef=b, target=None))
    other = make_lm("gpt2", vocab=VOCAB, seed=5, initializer_range=0.15)
    module.policy.network.load_state_dict(other.state_dict())
    advantages = score_table().double().flatten().unsqueeze(1)
    mask = torch.ones_like(advantages, dtype=torch.bool)
    experience = Experience(
        rollout=rollout,
        action_mask=mask,
        rewards=advantages,
        penalties=advantages,
        advantages=advantages,
        returns=advantages,
    )
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(len(rollout)):
        for sum_, g in zip(total, gradient_of(module, experience.select(torch.tensor([i])), parameters), strict=True):
            sum_ += float(old[i]) / 2 * g
    logp = enumerated_logprobs(module.policy.network)
    old = old.view(2, -1)
    exact = -(logp.exp() * score_table().double()).sum(1) + b * (old * (old.log() - logp)).sum(1)
    for found, wanted in zip(total, torch.autograd.grad(exact.mean(), parameters), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
