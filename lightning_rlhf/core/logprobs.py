"""Log-probs of chosen tokens at the temperature of sampling."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Cast `x` to float32 unless it is float64, the dtypes of log-probs and losses."""
    return x if x.dtype == torch.float64 else x.float()


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(token) = logit_token/τ − log Σ exp(logits/τ), in nats.

    The same τ divides the logits when sampling and in every log-prob (Ziegler et al. 2019, code).

    Args:
        logits: (..., V), any float dtype.
        tokens: (...), int64, in [0, V).
        temperature: τ > 0.

    Returns:
        log-probs (...), float32 (float64 if the logits are), ≤ 0.

    Raises:
        ValueError: the shapes do not match.
    """
    if logits.shape[:-1] != tokens.shape:
        needed, got = tuple(logits.shape[:-1]), tuple(tokens.shape)
        raise ValueError(f"`tokens` must have the shape of `logits` without its last axis, {needed}: got {got}")
    precise = full_precision(logits)
    scaled = (precise - precise.detach().amax(-1, keepdim=True)) / temperature  # or a common offset would cost digits
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
