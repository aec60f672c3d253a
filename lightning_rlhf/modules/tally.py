"""Means of what an iteration measured, over all minibatches and processes, by one collective."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.core import AllSum, full_precision, masked_sum


class Tally:
    """Sums and counts by name.

    `add` keeps tensors and waits for no device; `means` reads them once.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor | None = None) -> None:
        """Take in the entries that count.

        Args:
            name: logged name.
            values: any shape.
            mask: same shape, bool; None counts every entry.
        """
        values = full_precision(values.detach())
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        pair = torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]).double()
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, all_sum: AllSum) -> dict[str, float]:
        """Mean of every name over all processes, which must have added the same names."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = all_sum(torch.stack([self._sums[name] for name in names]))
        return dict(zip(names, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))
