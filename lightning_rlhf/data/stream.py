"""Streams of batches by step number, which a data loader reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_rlhf.data.sampling_order import Order


class Stream(Dataset[Any]):
    """Batches of examples, indexed by step from the start of training.

    Args:
        examples: rows as tokens.
        order: which of them make up the batch of a step on this rank.
        collate: examples, and whether each counts, to a batch.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        order: Order,
        collate: Callable[[Sequence[Any], Sequence[bool]], Any],
    ) -> None:
        self.examples = examples
        self.order = order
        self.collate = collate

    def __len__(self) -> int:
        """Number of batches of one epoch."""
        return self.order.steps

    def __getitem__(self, step: int) -> Any:
        """Return this rank's batch at `step`."""
        keys = self.order(step)
        return self.collate([self.examples[max(key, ~key)] for key in keys], [key >= 0 for key in keys])


class JointStream(Dataset[dict[str, Any]]):
    """Several streams in step with the first, so that one position holds for all of them.

    Args:
        streams: by name; the first gives the epoch its length, the others never end.
    """

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = dict(streams)

    def __len__(self) -> int:
        """Number of batches of one epoch."""
        return len(next(iter(self.streams.values())))

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return each stream's batch at `step`, by name."""
        return {name: stream[step] for name, stream in self.streams.items()}
