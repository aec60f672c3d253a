"""Statistics of the unmasked entries: sums, means and variances."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
"""Function that sums a tensor over all processes. On one process it is `local`."""


def local(x: Tensor) -> Tensor:
    """Return the tensor itself, the sum over all processes if there is one."""
    return x


def with_first_of_empty(mask: Tensor) -> Tensor:
    """Make the first entry count in each row in which none does, (B, R) bool.

    An estimator puts the score of a response on its last action: this gives one to an episode that failed before its
    first turn, so that the baseline of its group still counts it.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (first & ~mask.any(1, keepdim=True))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum x over the entries that count; masked entries have no influence, even NaN.

    Args:
        x: any shape.
        mask: same shape as `x`, bool, True = counts.

    Returns:
        scalar of `x`'s dtype.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != mask.shape:
        raise ValueError(f"`mask` must have the shape of `x`: got {tuple(mask.shape)} for {tuple(x.shape)}")
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor, all_sum: AllSum = local) -> Tensor:
    """Mean over the entries that count, of all processes; 0 where none counts.

    Args:
        x: any shape.
        mask: same shape, bool.
        all_sum: sums a tensor over processes.

    Returns:
        scalar.
    """
    sums = all_sum(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
    return torch.div(sums[0], sums[1].clamp(min=1))


def masked_variance(x: Tensor, mask: Tensor, all_sum: AllSum = local) -> Tensor:
    """Biased variance Σ(x − mean)² / n over the entries that count, of all processes.

    Args:
        x: any shape.
        mask: same shape, bool.
        all_sum: sums a tensor over processes.

    Returns:
        scalar ≥ 0.
    """
    return masked_mean((x - masked_mean(x, mask, all_sum)).square(), mask, all_sum)


def whiten(x: Tensor, mask: Tensor, *, all_sum: AllSum = local) -> Tensor:
    """Whiten to (x − mean) / √(var + 1e-8) over the entries that count of all processes (Ziegler et al. 2019, code).

    The variance is biased; equal entries give 0.

    Args:
        x: any shape.
        mask: same shape, bool.
        all_sum: sums a tensor over processes.

    Returns:
        the shape of `x`; 0 where masked.
    """
    centered = x - masked_mean(x, mask, all_sum)
    centered = centered - masked_mean(centered, mask, all_sum)  # the rounding of the mean, which √ε would blow up
    white = centered * torch.rsqrt(masked_variance(centered, mask, all_sum) + 1e-8)
    return torch.where(mask, white, torch.zeros_like(white))
