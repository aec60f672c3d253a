"""Evaluators run on the same held-out data, with notes gathered from all processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.distributed.ranks import Ranks, in_order
from lightning_rlhf.evaluation.evaluator import Answers, Columns, Evaluator, Texts
from lightning_rlhf.rewards import Reward, Scores
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.types import PromptBatch, Rollout, Row, TextBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Cached responses to a batch of prompts with the prompts, in main memory."""

    tokens: Tensor
    rows: Sequence[Row]
    rollout: Rollout
    scores: Tensor
    version: int


class ReferenceAnswers:
    """Cache by batch of K responses of the reference to each held-out prompt with their scores.

    A reference that has moved since answers anew.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}

    def __call__(
        self, responder: Responder, batch: PromptBatch, batch_idx: int, *, samples: int
    ) -> tuple[Rollout, Tensor]:
        """Return B·K responses in consecutive rows and their scores after shaping, (B, K).

        Args:
            responder: whose reference and reward.
            batch: B prompts.
            batch_idx: their place in the evaluation, which names the random numbers.
            samples: K.
        """
        entry, tokens = self._kept.get(batch_idx), batch.tokens.cpu()
        version = responder.collector.reference.version
        cached = entry is not None and entry.scores.shape[1] == samples and entry.rows == batch.rows
        same = cached and entry is not None and entry.version == version and torch.equal(entry.tokens, tokens)
        if not responder.ranks.all(same) or entry is None:  # or else some would wait for others
            rollout = responder.respond_as_reference(batch, samples=samples, iteration=batch_idx)
            scores = responder.score(rollout, batch, iteration=batch_idx).total.view(-1, samples)
            kept: dict[str, Any] = {"rollout": _moved(rollout, "cpu"), "scores": scores.cpu(), "version": version}
            entry = Kept(tokens=tokens, rows=batch.rows, **kept)
            self._kept[batch_idx] = entry
        return _moved(entry.rollout, batch.tokens.device), entry.scores.to(batch.tokens.device)


def _moved(rollout: Rollout, device: torch.device | str) -> Rollout:
    columns = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    moved: Any = {name: None if value is None else value.to(device) for name, value in columns.items()}
    return Rollout(**moved)


NEEDS = {"prompts": "held-out prompts: set the data's `val` or `test`", "texts": "texts: set the data's `val_pretrain`"}


class Panel:
    """Runner of the evaluators beside a module's own evaluation.

    It draws from a random stream of its own and changes nothing that training reads.

    Args:
        evaluators: in the order in which they log.

    Raises:
        ValueError: two of them have one name.
    """

    def __init__(self, evaluators: Sequence[Evaluator]) -> None:
        names = [evaluator.name for evaluator in evaluators]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`evaluations` must have different names: got {twice} twice; set `name` of one")
        self.given = tuple(evaluators)
        self.current = self.given
        self._notes: list[list[tuple[Tensor, Columns]]] = []
        self._reference = ReferenceAnswers()

    def networks(self, tokenizer: PreTrainedTokenizerBase | None) -> list[nn.Module]:
        """Build the networks of the evaluators' own rewards and return them."""
        for reward in self._rewards():
            reward.prepare(tokenizer)
        return [network for reward in self._rewards() for network in reward.networks()]

    def begin(self, responder: Responder) -> None:
        """Discard the notes of an interrupted evaluation."""
        self._notes = [[] for _ in self.given]
        for reward in self._rewards():
            for network in reward.networks():
                network.to(responder.ranks.device)

    def check(self, batch: PromptBatch) -> None:
        """Raise ValueError if an evaluator needs a column that the batch lacks."""
        if batch.rows:
            names = {name for row in batch.rows for name in row}
            for _, evaluator in self._of("prompts"):
                evaluator.check_columns(names)

    def prompts(
        self, responder: Responder, batch: PromptBatch, batch_idx: int, rollout: Rollout, scores: Scores
    ) -> None:
        """Note a batch of prompts with the policy's responses."""
        present = self._of("prompts")
        if not present:
            return
        answers = self._answers(responder, batch, batch_idx, rollout, scores)
        for number, evaluator in present:
            self._note(responder.ranks, number, evaluator.of_answers(answers), batch.is_real, batch_idx)

    def texts(self, responder: Responder, batch: TextBatch, batch_idx: int, logprobs: Tensor) -> None:
        """Note a batch of texts with the policy's log-probs, (B, L − 1)."""
        texts = Texts(texts=batch, logprobs=logprobs, reference=partial(_reference_logprobs, responder, batch))
        for number, evaluator in self._of("texts"):
            self._note(responder.ranks, number, evaluator.of_texts(texts), batch.target.any(1), batch_idx)

    def conclude(self, ranks: Ranks, *, remember: bool, only_prompts: bool = False) -> dict[str, float]:
        """Return the results of all evaluators by name.

        Args:
            ranks: whose notes are brought together.
            remember: whether the evaluators of a training run adapt; otherwise those that were given conclude.
            only_prompts: whether evaluators of texts are left out, as where a set has none.

        Raises:
            ValueError: the data served nothing that an evaluation is of.
        """
        results: dict[str, float] = {}
        successors = []
        for evaluator, batches in zip(self.current if remember else self.given, self._notes, strict=True):
            if only_prompts and evaluator.serves == "texts":
                successors.append(evaluator)
                continue
            notes = in_order(ranks, batches)
            if notes is None:
                raise ValueError(f"{type(evaluator).__name__} needs {NEEDS[evaluator.serves]}; or leave it out")
            results |= evaluator.conclude(notes)
            successors.append(evaluator.adapted(notes))
        if remember:
            self.current = tuple(successors)
        return results

    def _of(self, served: str) -> list[tuple[int, Evaluator]]:
        return [(number, each) for number, each in enumerate(self.current) if each.serves == served]

    def _rewards(self) -> list[Reward]:
        return [reward for evaluator in self.given for reward in evaluator.rewards]

    def _note(self, ranks: Ranks, number: int, columns: Columns, counts: Tensor, batch_idx: int) -> None:
        """Store the rows that count with their place in the file."""
        places = batch_idx * 2**32 + torch.arange(len(counts)) * ranks.world + ranks.rank
        counts = counts.cpu()
        values = {name: column.detach().cpu()[counts].double() for name, column in columns.items()}
        self._notes[number].append((places[counts], values))

    def _answers(
        self, responder: Responder, batch: PromptBatch, batch_idx: int, rollout: Rollout, scores: Scores
    ) -> Answers:
        samples = max(evaluator.reference_samples for evaluator in self.current)
        reference, theirs = None, scores.total.new_zeros(len(scores.total), 0)
        if samples:
            reference, theirs = self._reference(responder, batch, batch_idx, samples=samples)
        several, raw = self._several(responder, batch, batch_idx)

        def score(reward: Reward, responses: Rollout) -> Scores:
            return responder.score_by(reward, responses, batch, iteration=batch_idx)

        return Answers(
            prompts=batch,
            policy=rollout,
            scores=scores.total,
            reference=reference,
            reference_scores=theirs,
            several=several,
            several_scores=raw,
            tokenizer=responder.tokenizer,
            score=score,
            agreed=responder.ranks.all,
        )

    def _several(self, responder: Responder, batch: PromptBatch, batch_idx: int) -> tuple[Rollout | None, Tensor]:
        """Sample further responses of the policy with their scores before shaping, (B, N)."""
        samples = max(evaluator.policy_samples for evaluator in self.current)
        if samples == 0:
            return None, torch.zeros(len(batch.tokens), 0)
        rollout = responder.sample(batch, samples=samples, stream="several", iteration=batch_idx)
        scores = responder.score_by(responder.collector.reward, rollout, batch, iteration=batch_idx)
        return rollout, scores.total.view(-1, samples)


def _reference_logprobs(responder: Responder, batch: TextBatch) -> Tensor:
    with responder.collector.reference.model() as model:
        return model.text_logprobs(batch)
