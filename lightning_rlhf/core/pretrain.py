"""Pretraining term of PPO-ptx and loss of SFT: next-token prediction."""

from __future__ import annotations

from torch import Tensor

from lightning_rlhf.core.masked import masked_sum


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
