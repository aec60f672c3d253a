"""Running pass rates of prompts, and which of them rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core import Curriculum


@dataclass(slots=True, kw_only=True)
class Record:
    """Running pass rate of a prompt.

    Attributes:
        rate: in [0, 1].
        until: first rollout in which the prompt may be drawn again.
    """

    rate: float
    until: int


class PassRates:
    """Running pass rates by prompt, the same on every process.

    Args:
        curriculum: decides who rests; None lets all be drawn and keeps no record.
    """

    def __init__(self, curriculum: Curriculum | None) -> None:
        self.curriculum = curriculum
        self._records: dict[int, Record] = {}

    def awake(self, key: int, iteration: int) -> bool:
        """Return True if a prompt may be drawn for a rollout.

        Args:
            key: of the prompt (`ahead.keys_of`).
            iteration: which rollout.
        """
        record = self._records.get(key)
        return record is None or record.until <= iteration

    def resting(self, iteration: int) -> int:
        """Number of prompts that rest in a rollout."""
        return sum(record.until > iteration for record in self._records.values())

    def note(self, key: int, scores: Tensor, iteration: int) -> None:
        """Take in the scores of the responses to a prompt.

        Args:
            key: of the prompt.
            scores: before shaping, (k,), reward units.
            iteration: the rollout they were drawn for.
        """
        if self.curriculum is None:
            return
        before = self._records.get(key)
        share = float((scores >= self.curriculum.solved).double().mean())
        rate = self.curriculum.moved(None if before is None else before.rate, share)
        until = iteration + 1 + (self.curriculum.rest if self.curriculum.rests(rate) else 0)
        self._records[key] = Record(rate=rate, until=until)

    def state(self) -> dict[str, Tensor]:
        """Return the records for a checkpoint: keys, rates and ends of rest, (N,) each; empty without any."""
        if not self._records:
            return {}
        records = self._records.values()
        return {
            "keys": torch.tensor(list(self._records), dtype=torch.int64),
            "rates": torch.tensor([record.rate for record in records], dtype=torch.float64),
            "until": torch.tensor([record.until for record in records], dtype=torch.int64),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the records of a checkpoint."""
        columns = [state[name].tolist() for name in ("keys", "rates", "until")] if state else [[], [], []]
        rows = zip(*columns, strict=True)
        self._records = {key: Record(rate=rate, until=until) for key, rate, until in rows}
