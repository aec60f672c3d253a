"""Metrics that outlive an evaluation: sums over all processes, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric


def begin(*metrics: Metric) -> None:
    """Empty the metrics, in tensors that training may write to: `validate` and `test` run in inference mode."""
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()


class Sums(Metric):
    """What a metric adds up; `compute` reads the sums over all processes.

    Args:
        shape: of `sums`.
    """

    full_state_update = False
    sums: Tensor
    """Σ, of `shape`, float64."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Sums:
        """Follow the module to its device but not to its dtype: in bfloat16 a count stops at 256."""
        super()._apply(fn, exclude_state)
        self.sums, self._defaults["sums"] = self.sums.double(), self._defaults["sums"].double()
        return self


class Mean(Sums):
    """Mean of all numbers, each of the same weight."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, values: Tensor) -> None:
        """Take in numbers or truth values of any shape."""
        values = values.detach().double()
        self.sums += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def compute(self) -> Tensor:
        """Σ/n, NaN where there was nothing."""
        return self.sums[0] / self.sums[1]


def binned(bins: Tensor, count: int, *quantities: Tensor) -> Tensor:
    """Per bin the number of observations, then the sum of each quantity over them, (count, 1 + quantities), float64.

    Args:
        bins: the bin of each of N observations, (N,), int64.
        count: how many bins there are.
        quantities: numbers or truth values, (N,) each.
    """
    rows = torch.stack([torch.ones_like(bins), *quantities], 1).double()
    return one_hot(bins, count).double().T @ rows
