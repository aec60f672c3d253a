"""Responses to prompts and their scores, for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import Algorithm
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.engines.generation import row_uniforms
from lightning_rlhf.engines.local import sample
from lightning_rlhf.models.limits import check_length
from lightning_rlhf.rewards.errors import scored_or_told
from lightning_rlhf.rewards.reward import Reward, Scores
from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.scored import without_failed
from lightning_rlhf.types import PromptBatch, Rollout

STREAM = "reference"
"""Random stream of the reference; each response to a prompt has a stream of its own below it."""


@torch.no_grad()
def reference_rollout(collector: Collector, prompts: PromptBatch, *, samples: int, iteration: int) -> Rollout:
    """Sample B·k responses of π_ref with the sampler's log-probs, those of one prompt in consecutive rows.

    Response j to a prompt is the same however many are asked for and whatever the number of processes. Of a sharded
    reference all processes must call this together.

    Args:
        collector: whose reference, at its temperature and length.
        prompts: B prompts of this process.
        samples: k, responses to each prompt, ≥ 1.
        iteration: which batch of prompts.
    """
    generation, ranks = collector.generation, collector.ranks
    rows = range(ranks.rank, len(prompts.tokens) * ranks.world, ranks.world)
    seed, length = generation.seed or 0, generation.max_new_tokens
    place: dict[str, Any] = {"seed": seed, "iteration": iteration, "rows": rows, "length": length}
    uniforms = torch.stack([row_uniforms(stream=f"{STREAM}/{j}", **place) for j in range(samples)], 1).flatten(0, 1)
    room = replace(generation, slots=None if generation.slots is None else max(generation.slots, samples))
    with collector.reference.model() as model:
        longest = prompts.tokens.shape[1] + generation.max_new_tokens
        check_length(model.network, longest, limits="the data's `max_prompt_tokens` or `max_new_tokens`")
        return sample(model, prompts, uniforms, room, samples=samples).rollout(prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Responder:
    """Policy, reference and reward of a module behind one interface.

    Attributes:
        collector: draws responses and measures them.
        algorithm: whose shaping rules the scores go through, as they are at the start.
        tokenizer: for text; None if the policy has none.
    """

    collector: Collector
    algorithm: Algorithm
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def ranks(self) -> Ranks:
        """Ranks of the processes that respond together."""
        return self.collector.ranks

    def collect(
        self, prompts: PromptBatch, *, samples: int, iteration: int, following: PromptBatch | None = None
    ) -> Rollout:
        """Sample a rollout to train on (see `Collector.collect`)."""
        self._check(prompts)
        self.collector.updates.steps(len(prompts.tokens) * samples)
        return self.collector.collect(prompts, samples=samples, iteration=iteration, following=following)

    def draw(self, prompts: PromptBatch, *, samples: int, iteration: int, batch: int) -> Rollout:
        """Sample a batch of responses to choose from (see `Collector.draw`)."""
        self._check(prompts)
        self.collector.updates.steps(len(prompts.tokens) * samples)
        return self.collector.draw(prompts, samples=samples, iteration=iteration, batch=batch)

    def measure(self, rollout: Rollout) -> Rollout:
        """Measure what is learned from (see `Collector.measure`)."""
        return self.collector.measure(rollout)

    def respond(self, prompts: PromptBatch, *, samples: int, stream: str, iteration: int) -> Rollout:
        """Sample a rollout for evaluation (see `Collector.respond`)."""
        self._check(prompts)
        return self.collector.respond(prompts, samples=samples, stream=stream, iteration=iteration)

    def sample(self, prompts: PromptBatch, *, samples: int, stream: str, iteration: int) -> Rollout:
        """Sample B·k responses for evaluation without measuring them; arguments as of `respond`."""
        self._check(prompts)
        return self.collector.sampler.rollout(prompts, samples, stream=stream, iteration=iteration)

    def respond_as_reference(self, prompts: PromptBatch, *, samples: int, iteration: int) -> Rollout:
        """Sample responses of the reference (see `reference_rollout`)."""
        return reference_rollout(self.collector, prompts, samples=samples, iteration=iteration)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, prompts: PromptBatch, *, iteration: int, algorithm: Algorithm | None = None
    ) -> Scores:
        """Return r_φ(x, y) after the shaping rules, (B,), in reward units with the unshaped parts.

        Args:
            rollout: B responses.
            prompts: that are answered.
            iteration: which rollout.
            algorithm: whose rules have adapted; None for those of the start, by which evaluations stay comparable.

        Raises:
            RewardError: the reward failed on some process.
        """
        with self.collector.clock.phase("reward"):
            scores = self.score_by(self.collector.reward, rollout, prompts, iteration=iteration)
        raw = without_failed(rollout, scores.total.detach().to(rollout.logprobs))
        shaped = (algorithm or self.algorithm).shaped(raw, lengths=rollout.lengths, ended=rollout.ended)
        return scores._replace(total=shaped, raw=raw)

    def score_by(self, reward: Reward, rollout: Rollout, prompts: PromptBatch, *, iteration: int) -> Scores:
        """Score a rollout with any reward, (B,), before shaping; every process fails if one does.

        Raises:
            RewardError: the reward failed on some process.
        """
        rows = prompts.rows_of(rollout)
        return scored_or_told(reward, rollout, rows, agreed=self.ranks.all, iteration=iteration, run=self.ranks.folder)

    def _check(self, prompts: PromptBatch) -> None:
        """Raise ValueError before anything is sampled if the prompts are too long or lack a column."""
        if prompts.rows:
            self.collector.reward.check_columns({name for row in prompts.rows for name in row})
        longest = prompts.tokens.shape[1] + self.collector.sampler.longest
        limits = "the data's `max_prompt_tokens`, or `max_new_tokens` (of an episode: `environment.tokens`)"
        check_length(self.collector.policy.network, longest, limits=limits)
