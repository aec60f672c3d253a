"""Held-out prompts: generate, score, compare with the reference. Held-out texts: next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rlhf.modules.evaluator import Evaluator
from lightning_rlhf.modules.panel import Panel
from lightning_rlhf.modules.tally import Tally
from lightning_rlhf.rollout import Scores
from lightning_rlhf.rollout.text import texts_of
from lightning_rlhf.types import Experience, Outcome, PromptBatch, Rollout, TextBatch

if TYPE_CHECKING:
    from lightning_rlhf.modules.ppo import PPOModule


def observe(tally: Tally, rollout: Rollout, scores: Scores, counts: Tensor, prefix: str) -> None:
    """Add what a rollout says of the objective (Ouyang et al. 2022, eq. 2).

    Args:
        tally: takes the means.
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        counts: rows that count, (B,), bool.
        prefix: of the names.
    """
    log_ratio = (rollout.logprobs - rollout.ref_logprobs).sum(1)
    tally.add(f"{prefix}/kl", log_ratio, counts)
    tally.add(f"{prefix}/entropy", -rollout.logprobs.sum(1), counts)
    tally.add(f"{prefix}/response_length", rollout.lengths.to(scores.total), counts)
    tally.add(f"{prefix}/eos_rate", rollout.ended.to(scores.total), counts)
    tally.add(f"{prefix}/scores", scores.total, counts)
    for name, part in scores.parts.items():
        tally.add(f"{prefix}/scores/{name}", part, counts)


def outcome_of(rollout: Rollout, scores: Scores, prompts: PromptBatch, experience: Experience | None = None) -> Outcome:
    """What callbacks may look at, without the graph that the update goes on from.

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        prompts: that were responded to.
        experience: the same responses with their advantages, where they are learned from.
    """
    groups, advantages = rollout.groups, None
    if experience is not None:
        mask = experience.mask
        advantages = torch.where(mask, experience.advantages, 0.0).sum(1) / mask.sum(1)
    return Outcome(
        rollout=replace(rollout, live=None),
        rows=[prompts.rows[i] for i in groups.tolist()],
        raw_scores=scores.total if scores.raw is None else scores.raw,
        scores=scores.total,
        parts=scores.parts,
        counts=prompts.counts[groups],
        advantages=advantages,
    )


class Evaluation:
    """Validation, test and prediction of a `PPOModule`, with random numbers of their own.

    Args:
        module: whose policy, reward and reference.
        evaluators: what else validation and test measure.
    """

    def __init__(self, module: PPOModule, evaluators: Sequence[Evaluator] = ()) -> None:
        self.module, self.tally, self.panel = module, Tally(), Panel(module, evaluators)

    def begin(self) -> None:
        """Forget what an interrupted evaluation took in."""
        self.tally = Tally()
        self.panel.begin()

    @torch.no_grad()
    def step(self, batch: PromptBatch | TextBatch, batch_idx: int) -> None:
        """Take in a batch of prompts, or of texts."""
        self.module.outcome = None
        if isinstance(batch, PromptBatch):
            rollout, scores = self._rollout(batch, batch_idx)
            observe(self.tally, rollout, scores, batch.counts, "")
            self.panel.prompts(batch, batch_idx, rollout, scores)
            self.module.outcome = outcome_of(rollout, scores, batch)
            return
        wanted, width = batch.target[:, 1:], batch.tokens.shape[1] - 1
        logprobs = self.module.policy(batch.tokens, batch.mask, width=width, wanted=wanted)
        self.tally.add("/ptx_loss", -logprobs, wanted)
        self.panel.texts(batch, batch_idx, logprobs)

    def log(self, stage: str) -> None:
        """Log the means over all processes as `stage/name` and begin anew; `stage/reward` is the mean score."""
        means = self.tally.means(self.module.all_sum)
        named = {stage + name.replace("/scores", "/reward", 1): value for name, value in means.items()}
        named |= {f"{stage}/{name}": value for name, value in self.panel.conclude().items()}
        self.module.log_dict(named, sync_dist=True)

    @torch.no_grad()
    def predict(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per prompt that counts."""
        outcome, tokenizer = outcome_of(*self._rollout(batch, batch_idx), batch), self.module.tokenizer
        texts: list[Any] = outcome.tokens()
        if tokenizer is not None:
            texts = texts_of(texts, tokenizer)
        found = zip(outcome.rows, texts, outcome.numbers(), outcome.counts.tolist(), strict=True)
        return [dict(row) | {"response": text} | numbers for row, text, numbers, counts in found if counts]

    def _rollout(self, batch: PromptBatch, batch_idx: int) -> tuple[Rollout, Scores]:
        rollout = self.module.roll_out(batch, 1, stream="eval", iteration=batch_idx)
        return rollout, self.module.score(rollout, batch)
