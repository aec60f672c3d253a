"""Data loaders over streams of batches by step number, with one that resumes at its saved position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

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


class BatchSchedule(DistributedSampler[int]):
    """Steps of one epoch, e · steps + start … (e + 1) · steps - 1: whole batches and not rows.

    A `DistributedSampler` by type only: that is how Lightning knows to put no sampler of its own in its place. The
    batch of a step already belongs to one rank, so every rank has the same steps.

    Args:
        steps: batches of one epoch.

    Attributes:
        start: batches of the next epoch to skip; the loader sets it when it resumes.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(range(steps), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.steps = steps
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        """Yield the steps of the epoch last given to `set_epoch`."""
        first = self.epoch * self.steps
        return iter(range(first + self.start, first + self.steps))

    def __len__(self) -> int:
        """Number of batches of a whole epoch, even if the epoch is resumed in its middle."""
        return self.steps


_END = object()
Loader = TypeVar("Loader", bound="DataLoader[Any]")


def make_loader(kind: type[Loader], stream: Stream | JointStream, *, num_workers: int = 0) -> Loader:
    """Build a loader of `kind` that serves the batches of `stream` unchanged.

    It draws from a generator of its own, so that starting an epoch leaves the global random state alone.
    """
    return kind(
        stream,
        batch_size=None,
        sampler=BatchSchedule(len(stream)),
        collate_fn=_unchanged,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )


class ResumableLoader(DataLoader[Any]):
    """Loader whose position Lightning saves, so that a resumed epoch continues with the next unseen batch.

    Batches are counted as they are handed out, not as workers prefetch them. The sampler is a `BatchSchedule`.
    """

    _epoch = 0  # of the position below
    _served = 0  # batches of that epoch already handed out
    _resuming = False  # whether the next iteration starts from that position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the sampler's epoch, starting after Lightning's `set_epoch`."""
        epoch = getattr(self.sampler, "epoch", 0)
        if not (self._resuming and self._epoch == epoch):
            self._epoch, self._served = epoch, 0
        self._resuming = False
        if isinstance(self.sampler, BatchSchedule):  # `overfit_batches` puts a plain one in its place
            self.sampler.start = self._served
        batches = super().__iter__()
        while (batch := self._next(batches)) is not _END:
            self._served += 1
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch or `_END`.

        Raises:
            RuntimeError: a worker died.
        """
        try:
            return next(batches, _END)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker died after batch {self._served} of epoch {self._epoch}, as the system kills one where "
                "memory is short; the last checkpoint is whole: resume with fewer `num_workers`, 0 for none"
            ) from error

    def state_dict(self) -> dict[str, int]:
        """Return the position: epoch, batches served in it and batches per epoch."""
        if self._served >= len(self):
            return {"epoch": self._epoch + 1, "served": 0, "steps": len(self)}
        return {"epoch": self._epoch, "served": self._served, "steps": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration continue from `state`.

        Raises:
            ValueError: it points into the middle of an epoch of another length.
        """
        if state["served"] and state["steps"] != len(self):
            raise ValueError(
                f"the checkpoint stopped after {state['served']} of {state['steps']} batches, but an epoch now has "
                f"{len(self)}: resume with the same data, batch size and number of processes, or from a checkpoint "
                "written at the end of an epoch"
            )
        self._epoch = state["epoch"]
        self._served = state["served"]
        self._resuming = True
        if isinstance(self.sampler, BatchSchedule):
            self.sampler.set_epoch(self._epoch)


def _unchanged(batch: Any) -> Any:
    return batch
