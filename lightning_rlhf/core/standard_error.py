"""Standard errors of means over held-out prompts or texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def standard_error(values: Tensor) -> float:
    """Standard error s/√N of the mean of N numbers, s with Bessel's correction; NaN for fewer than 2.

    Args:
        values: (N,), one for each prompt: responses to one prompt are no independent draws.
    """
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def ratio_standard_error(totals: Tensor, counts: Tensor) -> float:
    """Standard error of ρ = Σ totals/Σ counts over N independent texts; NaN for fewer than 2.

    The counts are random, too.

    √(N/(N − 1)·Σ (total_i − ρ·count_i)²)/Σ counts, the delta method (Cochran 1977, §6.4).

    Args:
        totals: (N,), for example nats.
        counts: (N,), for example tokens, with a sum above 0.
    """
    totals = totals.double()
    counts = counts.double()
    n = len(totals)
    residuals = totals - totals.sum() / counts.sum() * counts
    return float(torch.sqrt(residuals.square().sum() * n / (n - 1)) / counts.sum()) if n > 1 else math.nan
