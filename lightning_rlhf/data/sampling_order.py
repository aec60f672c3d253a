"""Row numbers of each batch of each rank, as a pure function of the step."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Order(ABC):
    """Base class of the row numbers that one rank takes at a step.

    A window of `batch_size · world` consecutive positions is dealt out in turn: rank r takes positions r, r + world, …,
    so that the ranks together hold what one process with `batch_size · world` would.

    Args:
        size: N, rows to choose from, at least 1.
        batch_size: B, rows of a whole batch on one rank.
        rank: this process, 0 to world - 1.
        world: W, how many processes share the rows.

    Attributes:
        steps: batches of one epoch, ceil(N / (B · W)), the same on every rank.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.size = size
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.window = batch_size * world
        self.steps = math.ceil(size / self.window)

    @abstractmethod
    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of this rank's batch at `step`, counted from the start of training.

        Returns:
            keys, at least one; `~i` is row i repeated only to fill the batch, and counts nowhere.
        """


class NextOrder(Order):
    """Order of the batches one step later.

    Args:
        order: of the batches.
    """

    def __init__(self, order: Order) -> None:
        super().__init__(order.size, batch_size=order.batch_size, rank=order.rank, world=order.world)
        self.order = copy.copy(order)  # which keeps a permutation in mind

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of this rank's batch at `step` + 1."""
        return self.order(step + 1)


class ShuffledOrder(Order):
    """Endless sequence of permutations for training, read without a gap so that rows are used equally.

    Permutation p depends on (seed, stream, p) alone. The last batch of an epoch runs on into the next permutation.

    Args:
        size: N, rows to choose from, at least 1.
        batch_size: B, rows of a whole batch on one rank.
        rank: this process, 0 to world - 1.
        world: W, how many processes share the rows.
        seed: another seed, other permutations.
        stream: another name, other permutations of the same seed.
    """

    def __init__(
        self, size: int, *, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, stream: str = ""
    ) -> None:
        super().__init__(size, batch_size=batch_size, rank=rank, world=world)
        self.seed, self.stream = seed, stream
        self._cached: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of this rank's batch at `step`; step s of epoch e is `e · steps + s`."""
        first = step * self.window
        return [self._row(position) for position in range(first + self.rank, first + self.window, self.world)]

    def _row(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._permutation(number)
        return int(self._cached[1][offset])

    def _permutation(self, number: int) -> Tensor:
        name = f"{self.stream}/{self.seed}/{number}".encode()
        seed = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1  # manual_seed wants an int64
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))


class FileOrder(Order):
    """Order of evaluation: every row once over the ranks in file order, the same in each epoch.

    A rank that the last window leaves empty gets one row again as a filler, for every rank must make as many steps.
    """

    def __call__(self, step: int) -> list[int]:
        """Return the row numbers of this rank's batch in window `step` modulo `steps`."""
        first = step % self.steps * self.window
        last = min(first + self.window, self.size)
        return list(range(first + self.rank, last, self.world)) or [~(last - 1)]
