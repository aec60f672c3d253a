"""Processes of a run under Lightning's trainer, with sums and gathers over them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """Processes that train a module together; only one without a trainer.

    Every process must call its collectives, in the same order.

    Args:
        module: asked for its trainer at each call.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module

    @property
    def rank(self) -> int:
        """Number of this process, 0 ≤ rank < world."""
        trainer = self._module._trainer
        return 0 if trainer is None else trainer.global_rank

    @property
    def world(self) -> int:
        """Number of processes in the run."""
        trainer = self._module._trainer
        return 1 if trainer is None else trainer.world_size

    @property
    def folder(self) -> Path:
        """Folder of the run, the trainer's `default_root_dir`; the working directory without a trainer."""
        trainer = self._module._trainer
        return Path() if trainer is None else Path(trainer.default_root_dir)

    @property
    def device(self) -> torch.device:
        """Device of this process's networks."""
        return self._module.device

    def sum(self, x: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        return x if self.world == 1 else self._module.trainer.strategy.reduce(x, reduce_op="sum")

    def all(self, decision: bool) -> bool:
        """Return True if the decision of every process is True."""
        return not self.sum(torch.tensor(float(not decision), device=self.device))

    def agree(self, problem: Exception | None) -> None:
        """Raise on every process if one has a problem, so that none waits for the others.

        Args:
            problem: of this process; None if it has none.

        Raises:
            RuntimeError: another process has one.
        """
        well = self.all(problem is None)
        if problem is not None:
            raise problem
        if not well:
            raise RuntimeError("another process of the run failed, and says why")

    def largest(self, count: int) -> int:
        """Return the largest count of any process."""
        if self.world == 1:
            return count
        mine = torch.tensor(count, device=self.device)
        return int(self._module.trainer.strategy.reduce(mine, reduce_op="max"))

    def gather(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes in rank order, (n, …), on the CPU; counts may differ."""
        if self.world == 1:
            return rows
        all_gather: Any = self._module.all_gather
        counts = all_gather(torch.tensor(len(rows), device=self.device)).flatten().tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = all_gather(padded.to(self.device)).cpu()
        return torch.cat([part[:count] for part, count in zip(whole, counts, strict=True)])

    def gather_objects(self, mine: list[T]) -> list[T]:
        """Gather what the lists of all processes hold, in rank order; anything that can be pickled."""
        if self.world == 1:
            return mine
        written = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(written)])).tolist()
        parts = self.gather(written).split(sizes)
        return [item for part in parts for item in pickle.loads(part.numpy().tobytes())]

    def gather_text(self, text: str) -> str:
        """Gather the texts of all processes in rank order; each may be empty."""
        written = torch.tensor(list(f"{text}\0".encode()), dtype=torch.uint8)  # not every backend sends empty tensors
        return bytes(self.gather(written).tolist()).decode().replace("\0", "")


def in_order(ranks: Ranks, batches: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor] | None:
    """Gather the rows of all processes, sorted by place; None if no process has a row.

    Args:
        ranks: the processes, which must all call this with as many batches and the same columns; a batch may be empty.
        batches: the places of b rows, (b,), and their columns by name, (b, …) each, on the CPU.
    """
    if not batches:
        return None
    places, columns = zip(*batches, strict=True)
    order = ranks.gather(torch.cat(places)).argsort(stable=True)
    whole = {name: ranks.gather(torch.cat([batch[name] for batch in columns])) for name in columns[0]}
    return {name: column[order] for name, column in whole.items()} if len(order) else None
