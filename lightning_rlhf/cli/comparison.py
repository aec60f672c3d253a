"""Agreement of two scores of the same responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Comparison:
    """Running comparison of two scores of the same responses; only one rollout is in memory.

    rank agreement = share of the pairs of one rollout, ties of either score apart, that both order alike: what a policy
    trained on either would learn.
    """

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._sums = [0.0] * 6  # n, Σx, Σy, Σx², Σy², Σxy of differences from the first, which spares digits
        self._group: int | None = None
        self._pairs: list[tuple[float, float]] = []
        self._alike = self._ordered = 0

    def add(self, old: float, new: float, *, group: int) -> None:
        """Add a response of rollout `group`; the responses of a rollout must follow each other."""
        if group != self._group:
            self._close()
            self._group = group
        self._pairs.append((old, new))
        self._first = self._first or (old, new)
        x, y = old - self._first[0], new - self._first[1]
        self._sums = [total + part for total, part in zip(self._sums, (1, x, y, x * x, y * y, x * y), strict=True)]

    def _close(self) -> None:
        scores = torch.tensor(self._pairs, dtype=torch.float64).reshape(-1, 2).T
        orders = [(x.unsqueeze(1) - x.unsqueeze(0)).sign() for x in scores]
        same: Tensor = orders[0] * orders[1]
        self._alike += int((same > 0).sum()) // 2
        self._ordered += int((same != 0).sum()) // 2
        self._pairs = []

    @property
    def count(self) -> int:
        """Number of responses so far."""
        return int(self._sums[0])

    @property
    def means(self) -> tuple[float, float]:
        """Means of the old and the new score."""
        n, x, y, *_ = self._sums
        old, new = self._first or (math.nan, math.nan)
        return old + x / max(n, 1), new + y / max(n, 1)

    @property
    def correlation(self) -> float:
        """Pearson's correlation, NaN if a score does not vary."""
        n, x, y, xx, yy, xy = self._sums
        spread = (n * xx - x * x) * (n * yy - y * y)
        return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else math.nan

    @property
    def agreement(self) -> float:
        """Rank agreement, NaN if no pair is ordered by both."""
        self._close()
        return self._alike / self._ordered if self._ordered else math.nan

    def report(self, output: str) -> str:
        """Summary of the comparison as text."""
        old, new = self.means
        agreement = f"{self.agreement:.4f} of {self._ordered} pairs of a rollout"
        named = {"responses": str(self.count), "mean raw_score": f"{old:.4f}", "mean rescored": f"{new:.4f}"}
        named |= {"Pearson correlation": f"{self.correlation:.4f}", "rank agreement": agreement, "written to": output}
        return "\n".join(f"{name:<20} {value}" for name, value in named.items())
