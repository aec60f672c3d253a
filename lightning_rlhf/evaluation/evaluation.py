"""Evaluation on held-out prompts and texts: scores against the reference and next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.core import Algorithm, group_size, group_std, k3
from lightning_rlhf.evaluation.evaluator import Evaluator
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics, with_spread
from lightning_rlhf.evaluation.panel import Panel
from lightning_rlhf.rewards import Scores
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.types import Experience, Outcome, PromptBatch, Rollout, TextBatch


def observed(rollout: Rollout, scores: Scores, *, score: str = "scores") -> dict[str, Tensor]:
    """Return the terms of the objective by name for each response, (B,) (Ouyang et al. 2022, eq. 2).

    Args:
        rollout: B responses.
        scores: (B,), reward units.
        score: what the score is called.
    """
    return {
        "kl": (rollout.logprobs - rollout.ref_logprobs).sum(1),
        "entropy": -rollout.logprobs.sum(1),
        "response_length": rollout.lengths.to(scores.total),
        "eos_rate": rollout.ended.to(scores.total),
        score: scores.total,
    }


def observed_parts(scores: Scores, *, score: str = "scores", mask: Tensor | None = None) -> MeanMetrics:
    """Compute the mean of each part of a reward over the responses that the part scored.

    Args:
        scores: whose parts, (B,) each, are NaN where the part gave none.
        score: what the score is called; its parts are `score/part`.
        mask: responses that count, (B,), bool; None counts all.
    """
    means = MeanMetrics()
    for name, part in scores.parts.items():
        answered = ~part.isnan() if mask is None else mask & ~part.isnan()
        means += MeanMetrics.of({f"{score}/{name}": part}, answered, only_where_counted=True)
    return means


def credited(rollout: Rollout, scores: Scores, experience: Experience) -> MeanMetrics:
    """Compute the metrics of a training rollout before its updates.

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        experience: the same responses with their advantages.
    """
    terms = observed(rollout, scores)
    raw = (scores.total if scores.raw is None else scores.raw).double()
    terms |= {"raw_scores": raw, "raw_scores_square": raw.square()}
    terms["rlhf_reward"] = experience.rewards.sum(1)
    terms["non_score_reward"] = experience.penalties.sum(1)
    if experience.kept is not None:
        terms["uncounted"] = (~experience.action_mask.any(1)).to(scores.total)
    of_tokens = {
        "policy/entropy_avg": rollout.entropy,
        "policy/kl_sampler": k3(rollout.sampler_logprobs - rollout.logprobs),
    }
    flat = group_std(scores.total, rollout.prompt_index) == 0  # of these GRPO learns nothing
    return (
        MeanMetrics.of({f"objective/{name}": term for name, term in terms.items()})
        + observed_parts(scores, score="objective/scores")
        + MeanMetrics.of(of_tokens, rollout.response_mask)
        + MeanMetrics.of({"objective/flat_groups": flat.to(scores.total)}, group_size(rollout.prompt_index) > 1)
    )


def learned(means: dict[str, float], algorithm: Algorithm) -> dict[str, float]:
    """Return the metrics of a rollout and its updates, with the coefficients in force.

    Args:
        means: of all processes, by logged name.
        algorithm: that learned from it.
    """
    stats = with_spread(means) | {"objective/kl_coef": algorithm.kl.coef}
    if algorithm.entropy_bonus is not None:
        stats["objective/entropy_coef"] = algorithm.entropy_bonus.price
    return stats | {f"surrogate/{name}": number for name, number in algorithm.surrogate.state().items()}


def outcome_of(rollout: Rollout, scores: Scores, prompts: PromptBatch, experience: Experience | None = None) -> Outcome:
    """Build the outcome for callbacks, detached from the graph that the update uses.

    Args:
        rollout: B responses.
        scores: (B,), reward units, and their parts.
        prompts: that were responded to.
        experience: the same responses with their advantages, where they are learned from.
    """
    advantages = None
    if experience is not None:
        mask = experience.action_mask
        advantages = torch.where(mask, experience.advantages, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return Outcome(
        rollout=replace(rollout, logprobs_with_grad=None),
        rows=prompts.rows_of(rollout),
        raw_scores=scores.total if scores.raw is None else scores.raw,
        scores=scores.total,
        parts=scores.parts,
        is_real=prompts.is_real[rollout.prompt_index],
        advantages=advantages,
    )


class Evaluation:
    """Validation, test and prediction of a policy with a random stream of its own.

    Args:
        evaluators: what validation and test measure beside reward and KL.
    """

    def __init__(self, evaluators: Sequence[Evaluator] = ()) -> None:
        self.panel = Panel(evaluators)
        self._metrics = MeanMetrics()

    def begin(self, responder: Responder) -> None:
        """Discard the batches of an interrupted evaluation and have the engine take the weights to be evaluated."""
        responder.collector.sampler.outdate()
        self._metrics = MeanMetrics()
        self.panel.begin(responder)

    @torch.no_grad()
    def step(self, responder: Responder, batch: PromptBatch | TextBatch, batch_idx: int) -> Outcome | None:
        """Evaluate a batch of prompts or texts and return the outcome of the prompts."""
        if isinstance(batch, TextBatch):
            logprobs = responder.collector.policy.text_logprobs(batch)
            self._metrics += MeanMetrics.of({"ptx_loss": -logprobs}, batch.target[:, 1:])
            self.panel.texts(responder, batch, batch_idx, logprobs)
            return None
        self.panel.check(batch)
        rollout = responder.respond(batch, samples=1, stream="eval", iteration=batch_idx)
        scores = responder.score(rollout, batch, iteration=batch_idx)
        self._metrics += MeanMetrics.of(observed(rollout, scores, score="reward"), batch.is_real)
        self._metrics += observed_parts(scores, score="reward", mask=batch.is_real)
        self.panel.prompts(responder, batch, batch_idx, rollout, scores)
        return outcome_of(rollout, scores, batch)

    def conclude(self, responder: Responder, *, remember: bool) -> dict[str, float]:
        """Return the means over all processes by name; `reward` is the mean score.

        Args:
            responder: whose processes.
            remember: whether evaluators that adapt do so, as between the validations of a run.
        """
        means = self._metrics.means(responder.ranks.sum)
        return means | self.panel.conclude(responder.ranks, remember=remember)

    @torch.no_grad()
    def predict(self, responder: Responder, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one record per prompt that counts."""
        rollout = responder.respond(batch, samples=1, stream="eval", iteration=batch_idx)
        outcome = outcome_of(rollout, responder.score(rollout, batch, iteration=batch_idx), batch)
        texts: list[Any] = outcome.tokens()
        if responder.tokenizer is not None:
            texts = texts_of(texts, responder.tokenizer)
        records = zip(outcome.rows, texts, outcome.numbers(), outcome.is_real.tolist(), strict=True)
        return [dict(row) | {"response": text} | numbers for row, text, numbers, counts in records if counts]
