"""Statistics of the responses to one prompt, identified by group ids and not by position."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sum(x: Tensor, groups: Tensor) -> Tensor:
    """Sum over each entry's group, in every entry of it.

    The sum is written as a masked one and not as a scatter, which on GPUs adds in another order at every run.

    Args:
        x: (B,).
        groups: which group each entry belongs to, (B,), int64, any values.

    Returns:
        (B,).

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != groups.shape:
        raise ValueError(f"`groups` must have the shape of `x`, {tuple(x.shape)}: got {tuple(groups.shape)}")
    named, place = torch.unique(groups, return_inverse=True)
    member = place.unsqueeze(1) == torch.arange(len(named), device=groups.device)
    return torch.where(member, x.unsqueeze(1), torch.zeros_like(x).unsqueeze(1)).sum(0)[place]


def group_size(groups: Tensor) -> Tensor:
    """Number of entries in each entry's group, (B,), int64."""
    return group_sum(torch.ones_like(groups), groups)


def group_mean(x: Tensor, groups: Tensor) -> Tensor:
    """Mean of each entry's group, (B,)."""
    return group_sum(x, groups) / group_size(groups)


def group_std(x: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation √(Σ(x − mean)² / (n − 1)) of each entry's group, (B,); exactly 0 if all are equal."""
    mean = group_mean(x, groups)
    differs = group_sum((x != group_first(x, groups)).to(x.dtype), groups) > 0
    squares = group_sum((x - mean).square(), groups)
    spread = (squares / (group_size(groups) - 1).clamp(min=1)).sqrt()
    return torch.where(differs, spread, torch.zeros_like(spread))


def group_first(x: Tensor, groups: Tensor) -> Tensor:
    """One entry of each entry's group, (B,), the same for all of it."""
    if len(x) == 0:
        return x
    return x[(groups.unsqueeze(0) == groups.unsqueeze(1)).to(torch.uint8).argmax(1)]
