"""An enumerable bandit with a softmax table as policy, trained by the library's own objects of `core`.

Every quantity that is reported is exact: E[r], KL to SFT and J are sums over all responses, not estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf import AdvantageEstimator, Surrogate
from lightning_rlhf.core import (
    BanditAdvantage,
    BatchMean,
    Clip,
    ConstantSchedule,
    Schedule,
    SeqMeanTokenSum,
    k3,
    local,
    penalized_rewards,
)

BETA = 0.5
"""Reward units per nat: the beta of J, whatever beta a run trains with."""


@dataclass(frozen=True, kw_only=True)
class Bandit:
    """Scores N(mean, 1) and a reference softmax(N(0, 1)), one draw per seed; the first dimension is the seed."""

    scores: Tensor
    logp_ref: Tensor

    @classmethod
    def drawn(cls, seeds: Sequence[int], *, prompts: int = 8, responses: int = 32, mean: float = 2.0) -> Bandit:
        """(S, P, Y) each: S seeds, P prompts, Y responses."""
        normal = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            normal.append(torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64))
        scores, logits = torch.stack(normal, 1)
        return cls(scores=scores + mean, logp_ref=logits.log_softmax(-1))

    def reward(self, logp: Tensor) -> Tensor:
        """E[r] over prompts and responses, (S,)."""
        return (logp.exp() * self.scores).sum(-1).mean(-1)

    def kl(self, logp: Tensor) -> Tensor:
        """KL(policy || SFT), mean over the prompts, (S,), nats."""
        return kl(logp, self.logp_ref)

    def objective(self, logp: Tensor) -> Tensor:
        """J = E[r] - BETA KL, (S,)."""
        return self.reward(logp) - BETA * self.kl(logp)

    def optimum(self, beta: float = BETA) -> Tensor:
        """log pi* = log pi_SFT + r/beta - log Z, (S, P, Y)."""
        return (self.logp_ref + self.scores / beta).log_softmax(-1)

    def best(self) -> Tensor:
        """J* = BETA log Z, mean over the prompts, (S,)."""
        return BETA * (self.logp_ref + self.scores / BETA).logsumexp(-1).mean(-1)

    def gradient(self, logp: Tensor) -> Tensor:
        """The gradient of J in the logits, (S, P, Y)."""
        logits = logp.clone().requires_grad_()
        return torch.autograd.grad(self.objective(logits.log_softmax(-1)).sum(), logits)[0]

    def gap_closed(self, logp: Tensor) -> Tensor:
        """(J - J_SFT) / (J* - J_SFT), (S,): 1 at the optimum, below 0 where J is worse than at the start."""
        start = self.objective(self.logp_ref)
        return (self.objective(logp) - start) / (self.best() - start)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, mean over the prompts, (S,), nats."""
    return (p.exp() * (p - q)).sum(-1).mean(-1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to train on a bandit."""

    surrogate: Surrogate = field(default_factory=Clip)
    advantage: AdvantageEstimator = field(default_factory=lambda: BanditAdvantage(baseline=BatchMean()))
    beta: float = BETA
    epochs: int = 1
    """Inner epochs."""
    minibatches: int = 4
    """Optimizer steps per inner epoch."""
    rollouts: int = 60
    samples: int = 8
    """Responses to each prompt in a rollout; 0 takes all of them, weighted by their probability: no noise is left."""
    group: int = 4
    """k: responses that a baseline per prompt compares; must divide `samples`."""
    lr: float = 0.05
    schedule: Schedule = field(default_factory=ConstantSchedule)


class Drawn(NamedTuple):
    """A rollout: the responses of every seed, one row each, (S, B), and what is known of them."""

    prompt: Tensor
    response: Tensor
    weight: Tensor
    logp: Tensor


def roll_out(logp: Tensor, samples: int, generator: torch.Generator) -> Drawn:
    """Responses to every prompt, sampled, or all of them with weight Y pi(y|x)."""
    seeds, prompts, responses = logp.shape
    if samples == 0:
        response = torch.arange(responses).expand(seeds, prompts, responses)
        weight = responses * logp.exp()
    else:
        flat = logp.exp().reshape(-1, responses)
        response = torch.multinomial(flat, samples, replacement=True, generator=generator).view(seeds, prompts, -1)
        weight = torch.ones(response.shape, dtype=logp.dtype)
    prompt = torch.arange(prompts).view(1, -1, 1).expand_as(response)
    chosen = logp.gather(-1, response)
    return Drawn(*(x.reshape(seeds, -1) for x in (prompt, response, weight, chosen)))


class Learner:
    """A policy per seed, all trained in step: a row of the batch belongs to one seed, and none sees another's."""

    def __init__(self, bandit: Bandit, run: Run, *, start: Tensor | None = None) -> None:
        self.bandit, self.run = bandit, run
        self.logits = (bandit.logp_ref if start is None else start).clone().requires_grad_()
        seeds = len(self.logits)
        self.surrogates = [run.surrogate] * seeds
        self.advantages = [run.advantage] * seeds
        self.optimizer = torch.optim.Adam([self.logits], lr=run.lr, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(0)

    @property
    def logp(self) -> Tensor:
        """log pi, (S, P, Y)."""
        return self.logits.log_softmax(-1)

    def credit(self, drawn: Drawn) -> Tensor:
        """A = r - beta log(pi_old/pi_SFT) - baseline, (S, B), by the library; the baselines take in their seed."""
        place = (torch.arange(len(self.logits)).unsqueeze(1), drawn.prompt, drawn.response)
        scores, kl_ref = self.bandit.scores[place], drawn.logp - self.bandit.logp_ref[place]
        found, groups = [], torch.arange(scores.shape[1]) // self.run.group
        for seed, estimator in enumerate(self.advantages):
            mask = torch.ones(scores.shape[1], 1, dtype=torch.bool)
            rewards = penalized_rewards(scores[seed], kl_ref[seed].unsqueeze(1), mask, coef=self.run.beta)
            empty = torch.zeros_like(rewards)
            credit = estimator(rewards, empty, mask, groups=groups, all_sum=local)
            self.advantages[seed] = estimator.adapted(float(rewards.mean()))
            found.append(credit.advantages.squeeze(1))
        return torch.stack(found)

    def loss(self, drawn: Drawn, advantages: Tensor) -> Tensor:
        """Sum over the seeds of the mean over their responses: what one seed's parameters see is its own mean."""
        place = (torch.arange(len(self.logits)).unsqueeze(1), drawn.prompt, drawn.response)
        log_ratio = self.logp[place] - drawn.logp
        alike = all(surrogate == self.surrogates[0] for surrogate in self.surrogates)
        if alike:
            loss = self.surrogates[0](log_ratio, advantages).loss
        else:  # b has adapted to each seed
            rows = zip(self.surrogates, log_ratio, advantages, strict=True)
            loss = torch.stack([surrogate(ratio, a).loss for surrogate, ratio, a in rows])
        loss = (loss * drawn.weight).reshape(-1, 1)
        mask, reduction = torch.ones_like(loss, dtype=torch.bool), SeqMeanTokenSum()
        return len(log_ratio) * reduction.total(loss, mask) / reduction.count(mask)

    def iterate(self, share: float) -> Tensor:
        """One rollout and its updates, at this share of the peak learning rate; KL(old || new), (S,), nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.run.lr
        old = self.logp.detach()
        drawn = roll_out(old, self.run.samples, self.generator)
        advantages = self.credit(drawn)
        for index in self.minibatches(drawn.response.shape[1]):
            self.optimizer.zero_grad()
            self.loss(Drawn(*(x[:, index] for x in drawn)), advantages[:, index]).backward()
            self.optimizer.step()
        place = (torch.arange(len(old)).unsqueeze(1), drawn.prompt, drawn.response)
        estimates = (drawn.weight * k3(drawn.logp - self.logp.detach()[place])).mean(1)
        pairs = zip(self.surrogates, estimates.tolist(), strict=True)
        self.surrogates = [surrogate.adapted(estimate) for surrogate, estimate in pairs]
        return kl(old, self.logp.detach())

    def minibatches(self, size: int) -> Iterator[Tensor]:
        """Indices of the rows of each optimizer step."""
        for _ in range(self.run.epochs):
            yield from torch.randperm(size, generator=self.generator).chunk(self.run.minibatches)

    def train(self) -> Iterator[tuple[int, Tensor]]:
        """(rollouts done, KL(old || new) of the last), after every rollout."""
        for rollout in range(self.run.rollouts):
            yield rollout + 1, self.iterate(self.run.schedule.factor(rollout, self.run.rollouts))

    def prices(self) -> list[float]:
        """KLPEN's b of each seed; 0 for the other surrogates."""
        return [getattr(surrogate, "coef", 0.0) for surrogate in self.surrogates]


def gradient_noise(bandit: Bandit, advantage: AdvantageEstimator, at: Tensor, *, draws: int, samples: int) -> float:
    """E|g - E g|^2 of one rollout's gradient at a policy, summed over the logits of one bandit (S = 1).

    Each draw is a row of a batch of equal bandits, so that one backward pass gives all gradients.
    """
    many = Bandit(scores=bandit.scores.expand(draws, -1, -1), logp_ref=bandit.logp_ref.expand(draws, -1, -1))
    learner = Learner(many, Run(advantage=advantage, samples=samples), start=at.expand(draws, -1, -1))
    drawn = roll_out(learner.logp.detach(), samples, learner.generator)
    learner.loss(drawn, learner.credit(drawn)).backward()
    return float(learner.logits.grad.var(0).sum())
