"""Sampling of one token per row from its own random number, with log-prob and entropy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlhf.core.logprobs import full_precision


class Draw(NamedTuple):
    """Tokens drawn in one pass, with their log-probs and entropies.

    Attributes:
        token: (B,), int64.
        logprob: log π(token), (B,), float32 or float64, nats.
        entropy: of the distribution drawn from, (B,), nats.
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor


def draw(logits: Tensor, uniforms: Tensor | None, *, temperature: float) -> Draw:
    """Draw tokens from softmax(logits/τ).

    log π = log p(token), and H = log Z − Σ p·z with log Z = z(token) − log p(token), so that one softmax serves all.

    Args:
        logits: (B, V), any float dtype.
        uniforms: (B,), float64, in [0, 1); None takes the most likely token.
        temperature: τ > 0.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    precise = full_precision(logits)
    scaled = (precise - precise.amax(-1, keepdim=True)) / temperature  # or a common offset would cost digits of H
    probabilities = scaled.softmax(-1)
    if uniforms is None:
        _check_finite(probabilities.sum(-1))
        token = scaled.argmax(-1)
    else:
        token = inverse_cdf(probabilities, uniforms)
    place = token.unsqueeze(1)
    logprob = probabilities.gather(1, place).log().squeeze(1)
    mean = torch.linalg.vecdot(probabilities, scaled.clamp(min=torch.finfo(scaled.dtype).min))  # 0·−∞ is no number
    return Draw(token, logprob, (scaled.gather(1, place).squeeze(1) - logprob - mean).clamp(min=0))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor, *, block: int = 256) -> Tensor:
    """Draw the first token of each row whose cumulative probability exceeds u.

    The block of the vocabulary is chosen first, then the token in it, so that only one block is summed token by token.
    The running sums are float64: in float32, over a whole vocabulary, up to 2e-4 of the mass can never be drawn.

    Args:
        probabilities: (B, V), float32 or float64; a token of probability 0 is never drawn.
        uniforms: (B,), float64, in [0, 1).
        block: tokens per block.

    Returns:
        (B,), int64.

    Raises:
        ValueError: a probability is NaN.
    """
    blocks = pad(probabilities, (0, -probabilities.shape[1] % block)).unflatten(1, (-1, block))
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    _check_finite(mass[:, -1])
    which, before = _first_above(mass, uniforms.to(mass.device).unsqueeze(1) * mass[:, -1:])
    inside = blocks.gather(1, which.unsqueeze(2).expand(-1, -1, block)).squeeze(1).cumsum(-1, dtype=torch.float64)
    token, _ = _first_above(inside, before)
    return (which * block + token).squeeze(1)


def _check_finite(total: Tensor) -> None:
    """Check that every row's probabilities have a finite sum.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    if not total.isfinite().all():
        raise ValueError(
            "the policy's logits are not finite: it diverged; lower the learning rate, or sample in float32"
        )


def _first_above(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of the first sum above the target and the rest of the target there, (B, 1) each."""
    below_all = torch.minimum(target, cumulative[:, -1:] * (1 - 2**-52))  # rounding must not run past the last sum
    index = torch.searchsorted(cumulative, below_all, right=True)
    sums = pad(cumulative, (1, 0))
    return index, (below_all - sums.gather(1, index)).clamp(min=0)
