"""Responses to prompts and their scores: what training and evaluation ask of a policy and its reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.core import Algorithm
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.models.context_length import check_length
from lightning_rlhf.rewards.errors import scored_or_told
from lightning_rlhf.rewards.reward import Reward, Scores
from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.rollout.reference import reference_rollout
from lightning_rlhf.types import PromptBatch, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Responder:
    """The policy, its reference and the reward of a module.

    Attributes:
        collector: draws responses and measures them.
        algorithm: whose shaping rules the scores go through.
        tokenizer: for text; None where the policy has none.
    """

    collector: Collector
    algorithm: Algorithm
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def ranks(self) -> Ranks:
        """The processes that respond together."""
        return self.collector.ranks

    def collect(self, prompts: PromptBatch, *, samples: int, iteration: int) -> Rollout:
        """A rollout to learn from (see `Collector.collect`)."""
        self._check_length(prompts)
        return self.collector.collect(prompts, samples=samples, iteration=iteration)

    def respond(self, prompts: PromptBatch, *, samples: int, stream: str, iteration: int) -> Rollout:
        """A rollout that nothing is learned from (see `Collector.respond`)."""
        self._check_length(prompts)
        return self.collector.respond(prompts, samples=samples, stream=stream, iteration=iteration)

    def respond_as_reference(self, prompts: PromptBatch, *, samples: int, iteration: int) -> Rollout:
        """Responses of the reference (see `reference_rollout`)."""
        return reference_rollout(self.collector, prompts, samples=samples, iteration=iteration)

    @torch.no_grad()
    def score(self, rollout: Rollout, prompts: PromptBatch, *, iteration: int) -> Scores:
        """r_φ(x, y) after the shaping rules, (B,), reward units, with the parts of the reward before them.

        Raises:
            RewardError: the reward failed on some process.
        """
        with self.collector.clock.phase("reward"):
            found = self.score_by(self.collector.reward, rollout, prompts, iteration=iteration)
        raw = found.total.detach().to(rollout.logprobs)
        shaped = self.algorithm.shaped(raw, lengths=rollout.lengths, ended=rollout.ended)
        return Scores(shaped, found.parts, raw)

    def score_by(self, reward: Reward, rollout: Rollout, prompts: PromptBatch, *, iteration: int) -> Scores:
        """Scores of any reward, (B,), agreed on by all processes, before shaping.

        Raises:
            RewardError: the reward failed on some process.
        """
        rows = prompts.rows_of(rollout)
        return scored_or_told(reward, rollout, rows, agreed=self.ranks.all, iteration=iteration)

    def _check_length(self, prompts: PromptBatch) -> None:
        longest = prompts.tokens.shape[1] + self.collector.generation.max_new_tokens
        limits = "the data's `max_prompt_tokens` or `max_new_tokens`"
        check_length(self.collector.policy.network, longest, limits=limits)
