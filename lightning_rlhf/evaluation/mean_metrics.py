"""Means of an iteration's metrics over all minibatches and processes, with one collective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from lightning_rlhf.core import AllSum, full_precision, masked_sum


@dataclass(frozen=True, slots=True)
class MeanMetrics:
    """Sums and counts by name that can be added without a synchronization of the device until `means`.

    Attributes:
        sums: (2,), float64, by logged name: the sum, and over how many entries.
        occasional: names without a mean where no process counted an entry; the mean of others is 0 then.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    occasional: frozenset[str] = frozenset()

    @classmethod
    def of(cls, values: Mapping[str, Tensor], mask: Tensor | None = None, *, only_where_counted: bool = False) -> Self:
        """Sum entries and count them.

        Args:
            values: by logged name, any shape.
            mask: entries that count, of the same shape, bool; None counts every entry.
            only_where_counted: whether there is no mean where no entry counts.
        """
        sums = {name: _sum_and_count(entries, mask) for name, entries in values.items()}
        return cls(sums, frozenset(sums if only_where_counted else ()))

    def __add__(self, other: MeanMetrics) -> MeanMetrics:
        """Add the sums of both; names need not be the same."""
        added = {name: self.sums[name] + sums if name in self.sums else sums for name, sums in other.sums.items()}
        return MeanMetrics({**self.sums, **added}, self.occasional | other.occasional)

    def means(self, all_sum: AllSum) -> dict[str, float]:
        """Return the mean of every name over all processes, which must have the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        sums = all_sum(torch.stack([self.sums[name] for name in names]))
        means = zip(names, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), sums[:, 1].tolist(), strict=True)
        return {name: mean for name, mean, count in means if count > 0 or name not in self.occasional}


def with_spread(means: Mapping[str, float]) -> dict[str, float]:
    """Replace mean squares by `policy/ratio_var`, `policy/sampler_ess` and `objective/raw_scores_std`.

    The effective sample size is a share of the actions, (mean w)² / mean w², 0 if every w is 0 (Kish 1965).

    Args:
        means: of an iteration by logged name, with the mean squares of what it replaces.
    """
    stats = dict(means)
    stats["policy/ratio_var"] = max(stats.pop("policy/ratio_square") - stats["policy/ratio"] ** 2, 0.0)
    mean, square = stats.pop("policy/sampler_ratio"), stats.pop("policy/sampler_ratio_square")
    stats["policy/sampler_ess"] = min(mean**2 / square, 1.0) if square > 0 else 0.0
    spread = stats.pop("objective/raw_scores_square") - stats["objective/raw_scores"] ** 2
    stats["objective/raw_scores_std"] = max(spread, 0.0) ** 0.5
    return stats


def _sum_and_count(values: Tensor, mask: Tensor | None) -> Tensor:
    values = full_precision(values.detach())
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    return torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]).double()
