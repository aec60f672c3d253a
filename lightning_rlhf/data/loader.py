"""Data loaders over streams of batches, with one that resumes at its saved position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from lightning_rlhf.data.schedule import BatchSchedule
from lightning_rlhf.data.stream import JointStream, Stream

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
