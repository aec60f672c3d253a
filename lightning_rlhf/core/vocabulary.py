"""Sums over the vocabulary at every token, with only a block of rows of the (N, V) logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lightning_rlhf.core.linear_logprobs import BLOCK, linear_logprobs
from lightning_rlhf.core.logprobs import full_precision, token_logprobs


class Predictions(NamedTuple):
    """Next-token distributions at N positions, before the softmax.

    Attributes:
        inputs: hidden states, (N, d), or the logits themselves, (N, V), where `weight` is None.
        weight: of the head, (V, d).
        bias: of the head, (V,).
    """

    inputs: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def size(self) -> int:
        """Number V of tokens in the vocabulary."""
        return len(self.weight) if self.weight is not None else self.inputs.shape[1]

    def logprobs(self, tokens: Tensor, *, temperature: float) -> Tensor:
        """Return log π(token), (N,), nats.

        Args:
            tokens: (N,), int64, in [0, V).
            temperature: τ the logits are divided by.
        """
        if self.weight is None:
            return token_logprobs(self.inputs, tokens, temperature)
        return linear_logprobs(self.inputs, self.weight, tokens, bias=self.bias, temperature=temperature)


class VocabularySums(NamedTuple):
    """Sums over the vocabulary at each position.

    Attributes:
        entropy: −Σ π·log π, the shape of the positions, nats.
        kl_ref: Σ π·(log π − log π_ref), of the same shape, nats; zeros without a reference.
    """

    entropy: Tensor
    kl_ref: Tensor


def vocabulary_sums(
    policy: Predictions, reference: Predictions | None, *, temperature: float, block: int = BLOCK
) -> VocabularySums:
    """Compute entropy and KL to the reference at N positions, (N,) each, with the gradient of both.

    The backward computes each block's logits again instead of keeping them. Of the reference no gradient is taken.

    Args:
        policy: π_θ.
        reference: π_ref at the same positions; None computes the entropy alone. Where one vocabulary is padded further
            than the other, as in models of one family, the KL is of both given the tokens they share.
        temperature: τ the logits of both are divided by.
        block: logits of one of them that exist at one time; at least one row is computed.

    Raises:
        ValueError: the reference has another number of positions.
    """
    if reference is not None and len(reference.inputs) != len(policy.inputs):
        raise ValueError(
            f"the reference must be at the policy's {len(policy.inputs)} positions: got {len(reference.inputs)}"
        )
    rows = max(block // policy.size, 1)
    others: list[Tensor | None] = [None] * -(-len(policy.inputs) // rows)
    if reference is not None:
        others = list(reference.inputs.split(rows))
    parts = [
        checkpoint(_sums, policy, own, reference, other, temperature, use_reentrant=False)
        for own, other in zip(policy.inputs.split(rows), others, strict=True)
    ]
    entropy, kl_ref = torch.cat(parts).unbind(1)
    return VocabularySums(entropy, kl_ref)


def _sums(
    policy: Predictions, own: Tensor, reference: Predictions | None, other: Tensor | None, temperature: float
) -> Tensor:
    """Compute entropy and KL of some rows, (n, 2)."""
    logprobs = _distribution(policy, own, temperature)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).sum(1)
    if reference is None or other is None:
        return torch.stack([entropy, torch.zeros_like(entropy)], 1)
    shared = min(policy.size, reference.size)
    if shared < policy.size:
        logprobs = logprobs[:, :shared].log_softmax(1)
        probabilities = logprobs.exp()
    with torch.no_grad():
        of_reference = _distribution(reference, other, temperature, shared)
    kl_ref = (probabilities * (logprobs - of_reference)).sum(1)
    return torch.stack([entropy, kl_ref], 1)


def _distribution(predictions: Predictions, inputs: Tensor, temperature: float, shared: int | None = None) -> Tensor:
    """Compute log π of the first `shared` tokens, (n, shared), in float32 or more; None is all of them."""
    logits = inputs if predictions.weight is None else linear(inputs, predictions.weight, predictions.bias)
    return (full_precision(logits[:, :shared]) / temperature).log_softmax(1)
