"""Evaluation on held-out prompts and texts: scores against the reference and next-token loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lightning_rlhf.evaluation.evaluator import Evaluator
from lightning_rlhf.evaluation.mean_metrics import MeanMetrics
from lightning_rlhf.evaluation.observation import observed, outcome_of
from lightning_rlhf.evaluation.panel import Panel
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.types import Outcome, PromptBatch, TextBatch


class Evaluation:
    """Validation, test and prediction of a policy with a random stream of its own.

    Args:
        evaluators: what validation and test measure beside reward and KL.
    """

    def __init__(self, evaluators: Sequence[Evaluator] = ()) -> None:
        self.panel = Panel(evaluators)
        self._metrics = MeanMetrics()

    def begin(self, responder: Responder) -> None:
        """Discard the batches of an interrupted evaluation."""
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
        rollout = responder.respond(batch, samples=1, stream="eval", iteration=batch_idx)
        scores = responder.score(rollout, batch, iteration=batch_idx)
        self._metrics += MeanMetrics.of(observed(rollout, scores, score="reward"), batch.is_real)
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
