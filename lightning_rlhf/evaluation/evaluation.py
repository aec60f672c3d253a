"""Evaluation on held-out prompts and texts: scores against the reference and next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    terms = {
        "kl": (rollout.logprobs - rollout.ref_logprobs).sum(1),
        "entropy": -rollout.logprobs.sum(1),
        "response_length": rollout.lengths.to(scores.total),
        "eos_rate": rollout.ended.to(scores.total),
        score: scores.total,
    }
    if rollout.failed is not None:
        terms |= {"turns": rollout.spans.to(scores.total), "failed": rollout.failed.to(scores.total)}
    return terms


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
    if algorithm.surrogate.adaptive:
        stats.setdefault("policy/kl_old", 0.0)  # no action counted, and nothing was learned
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
        name=prompts.name,
    )


@dataclass(slots=True, kw_only=True)
class HeldOut:
    """Measurements of one held-out set.

    Attributes:
        panel: evaluators with what they remember of this set.
        metrics: sums over the batches so far.
        batches: how many there were.
    """

    panel: Panel
    metrics: MeanMetrics = field(default_factory=MeanMetrics)
    batches: int = 0

    def begin(self, responder: Responder) -> None:
        """Discard the batches of an interrupted evaluation."""
        self.metrics, self.batches = MeanMetrics(), 0
        self.panel.begin(responder)


class Evaluation:
    """Validation, test and prediction of a policy with a random stream of its own.

    Batches of prompts say which held-out set they are of; each is measured by itself.

    Args:
        evaluators: what validation and test measure beside reward and KL.
    """

    def __init__(self, evaluators: Sequence[Evaluator] = ()) -> None:
        self.panel = Panel(evaluators)
        self._sets = {"": HeldOut(panel=self.panel)}

    def begin(self, responder: Responder) -> None:
        """Discard the batches of an interrupted evaluation and have the engine take the weights to be evaluated."""
        responder.collector.sampler.outdate()
        for held_out in self._sets.values():
            held_out.begin(responder)

    @torch.no_grad()
    def step(self, responder: Responder, batch: PromptBatch | TextBatch, batch_idx: int) -> Outcome | None:
        """Evaluate a batch of prompts or texts and return the outcome of the prompts."""
        if isinstance(batch, TextBatch):
            logprobs = responder.collector.policy.text_logprobs(batch)
            here = self._sets[""]
            here.batches += 1
            here.metrics += MeanMetrics.of({"ptx_loss": -logprobs}, batch.target[:, 1:])
            here.panel.texts(responder, batch, batch_idx, logprobs)
            return None
        here = self._of(batch.name, responder)
        here.panel.check(batch)
        stream = f"eval/{batch.name}" if batch.name else "eval"
        rollout = responder.respond(batch, samples=1, stream=stream, iteration=batch_idx)
        scores = responder.score(rollout, batch, iteration=batch_idx)
        here.batches += 1
        terms = observed(rollout, scores, score="reward")
        failed = terms.pop("failed", None)
        counted = batch.is_real if rollout.failed is None else batch.is_real & ~rollout.failed
        here.metrics += MeanMetrics.of(terms, counted)
        here.metrics += MeanMetrics.of({} if failed is None else {"failed": failed}, batch.is_real)
        here.metrics += observed_parts(scores, score="reward", mask=counted)
        here.panel.prompts(responder, batch, batch_idx, rollout, scores)
        return outcome_of(rollout, scores, batch)

    def conclude(self, responder: Responder, *, remember: bool) -> dict[str, dict[str, float]]:
        """Return the means over all processes by name of the set and of the number; `reward` is the mean score.

        Args:
            responder: whose processes.
            remember: whether evaluators that adapt do so, as between the validations of a run.
        """
        named = {name: held_out for name, held_out in self._sets.items() if name and held_out.batches}
        first = self._sets[""]
        served = {"": first} if first.batches or not named else {}
        return {
            name: held_out.metrics.means(responder.ranks.sum)
            | held_out.panel.conclude(responder.ranks, remember=remember, only_prompts=bool(name))
            for name, held_out in (served | named).items()
        }

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

    def _of(self, name: str, responder: Responder) -> HeldOut:
        """Return the measurements of a set, begun if it is new."""
        if name not in self._sets:
            self._sets[name] = HeldOut(panel=Panel(self.panel.given))
            self._sets[name].begin(responder)
        return self._sets[name]
