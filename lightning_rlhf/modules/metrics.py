"""Metrics summed over a whole evaluation and all processes, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric


def begin(*metrics: Metric) -> None:
    """Reset metrics to tensors that training may write to: `validate` and `test` run in inference mode."""
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()


class Sums(Metric):
    """Base class of metrics that are functions of sums over all processes.

    Args:
        shape: of `sums`.
    """

    full_state_update = False
    sums: Tensor
    """The sums, of `shape`, float64."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Sums:
        """Move the sums to the module's device but keep their dtype: a count in bfloat16 stops at 256."""
        super()._apply(fn, exclude_state)
        self.sums, self._defaults["sums"] = self.sums.double(), self._defaults["sums"].double()
        return self


class Mean(Sums):
    """Mean of all numbers seen, each with the same weight."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, values: Tensor) -> None:
        """Add numbers or booleans of any shape."""
        values = values.detach().double()
        self.sums += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def compute(self) -> Tensor:
        """Return the mean; NaN if no number was added."""
        return self.sums[0] / self.sums[1]


def binned(bins: Tensor, count: int, *quantities: Tensor) -> Tensor:
    """Count the observations and sum each quantity per bin, (count, 1 + quantities), in float64.

    Args:
        bins: the bin of each of N observations, (N,), int64.
        count: how many bins there are.
        quantities: numbers or truth values, (N,) each.
    """
    rows = torch.stack([torch.ones_like(bins), *quantities], 1).double()
    return one_hot(bins, count).double().T @ rows
