"""Cache of the reference's responses to held-out prompts: the reference is fixed, so each is drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.types import PromptBatch, Rollout, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Cached responses to a batch of prompts with the prompts, in main memory."""

    tokens: Tensor
    rows: Sequence[Row]
    rollout: Rollout
    scores: Tensor


class ReferenceAnswers:
    """Cache by batch of K responses of the reference to each held-out prompt with their scores."""

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
        cached = entry is not None and entry.scores.shape[1] == samples and entry.rows == batch.rows
        if not responder.ranks.all(cached and torch.equal(entry.tokens, tokens)):  # or else some would wait for others
            rollout = responder.respond_as_reference(batch, samples=samples, iteration=batch_idx)
            scores = responder.score(rollout, batch, iteration=batch_idx).total.view(-1, samples)
            entry = Kept(tokens=tokens, rows=batch.rows, rollout=_moved(rollout, "cpu"), scores=scores.cpu())
            self._kept[batch_idx] = entry
        return _moved(entry.rollout, batch.tokens.device), entry.scores.to(batch.tokens.device)


def _moved(rollout: Rollout, device: torch.device | str) -> Rollout:
    columns = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    return Rollout(**{name: None if value is None else value.to(device) for name, value in columns.items()})
