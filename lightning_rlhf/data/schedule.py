"""Sampler that yields the steps of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import DistributedSampler


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
