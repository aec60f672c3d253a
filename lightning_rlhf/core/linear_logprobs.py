"""Log-probs computed from hidden states, with only a block of rows of the (N, V) logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from lightning_rlhf.core.logprobs import full_precision

BLOCK = 2**24
"""Number of logits in memory at one time: 64 MiB in float32."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    block: int = BLOCK,
) -> Tensor:
    """Return log π(token) = z_token − log Σ exp z for N hidden states h with logits z = (W·h + b)/τ.

    The backward computes each block's logits again instead of keeping them, so that memory does not grow with N·V. The
    product is made in autocast's dtype where it is on, all else in float32 or more.

    Args:
        hidden: h, (N, d).
        weight: W of the language model's head, (V, d).
        tokens: (N,), int64, in [0, V).
        bias: b, (V,).
        temperature: τ > 0.
        block: logits that exist at one time; at least one row is computed.

    Returns:
        log-probs, (N,), float32 (float64 if `hidden` is), nats.

    Raises:
        ValueError: the shapes do not match.
    """
    if hidden.shape[:1] != tokens.shape or hidden.shape[1:] != weight.shape[1:]:
        raise ValueError(
            f"needed are hidden (N, d), weight (V, d) and tokens (N,): got {tuple(hidden.shape)}, "
            f"{tuple(weight.shape)} and {tuple(tokens.shape)}"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    rows = max(block // weight.shape[0], 1)
    with torch.autocast(device, enabled=False):
        logprobs: Tensor = _LinearLogprobs.apply(hidden, weight, bias, tokens, temperature, dtype, rows)
    return logprobs


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        parts = []
        matrix, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        for states, chosen in zip(torch.split(hidden.to(dtype), rows), torch.split(tokens, rows), strict=True):
            scaled = full_precision(linear(states, matrix, shift))
            top = scaled.amax(1, keepdim=True)
            total = scaled.sub_(top).div_(temperature).logsumexp(1)  # or a common offset would cost digits
            parts.append(torch.stack([scaled.gather(1, chosen.unsqueeze(1)).squeeze(1) - total, top.squeeze(1), total]))
        columns: Tensor = torch.cat(parts, 1)
        logprobs = columns[0]
        tops = columns[1]
        totals = columns[2]
        ctx.save_for_backward(hidden, weight, bias, tokens, tops, totals)
        ctx.temperature = temperature
        ctx.dtype = dtype
        ctx.rows = rows
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, tops, totals = ctx.saved_tensors
        matrix, shift = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for start in range(0, len(tokens), ctx.rows):
            part = slice(start, start + ctx.rows)
            states = hidden[part].to(ctx.dtype)
            scaled = full_precision(linear(states, matrix, shift)).sub_(tops[part].unsqueeze(1)).div_(ctx.temperature)
            slope = (grad[part] / ctx.temperature).unsqueeze(1)
            scaled.sub_(totals[part].unsqueeze(1)).exp_().mul_(-slope)  # ∂/∂z: −g·π …
            of_logits = scaled.scatter_add_(1, tokens[part].unsqueeze(1), slope).to(ctx.dtype)  # … + g at the token
            if of_hidden is not None:
                of_hidden[part] = of_logits @ matrix
            if of_weight is not None:
                of_weight += of_logits.t() @ states
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None
