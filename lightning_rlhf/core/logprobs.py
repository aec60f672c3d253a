"""Log-probs of chosen tokens and the next-token loss of SFT and PPO-ptx."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.core.masked import masked_sum


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


def next_token_loss(logprobs: Tensor, target: Tensor, *, count: Tensor | int) -> Tensor:
    """−Σ log π(x_t | x_<t) / n over the tokens that count (Ouyang et al. 2022, eq. 2, the γ term).

    The paper does not say how the term is normalized; here it is the mean over tokens, so γ = 27.8 weighs a token of
    text against an action of the surrogate.

    Args:
        logprobs: log π of tokens 1 .. L−1, (B, L − 1), nats.
        target: tokens that count, (B, L), bool; the first of a row has no prediction and must be False.
        count: n, the tokens that count in the whole optimizer step, of all processes.

    Returns:
        scalar, nats per token (a share of it, where `count` spans more rows than these).

    Raises:
        ValueError: `target` counts a first token, or the shapes do not match.
    """
    if logprobs.shape != target[:, 1:].shape:
        needed = (target.shape[0], target.shape[1] - 1)
        raise ValueError(f"`logprobs` must be (B, L − 1), here {needed}: got {tuple(logprobs.shape)}")
    if bool(target[:, 0].any()):
        raise ValueError("`target` counts the first token of a row, which nothing predicts: set column 0 to False")
    return -masked_sum(logprobs, target[:, 1:]) / max(int(count), 1)
