"""Batches of the preference stage: one shape for rankings and labels, and mismatched pairs for KTO."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.types import ComparisonBatch, LabeledBatch, TextBatch


def as_comparisons(batch: ComparisonBatch | LabeledBatch) -> ComparisonBatch:
    """Return labels as rankings of one response each: rank 0 is good, 1 bad and −1 a filler.

    Raises:
        ValueError: comparisons do not say where their responses begin.
    """
    if isinstance(batch, LabeledBatch):
        rank = torch.where(batch.target.any(1), (~batch.good).long(), -1).unsqueeze(1)
        unrated = torch.full(rank.shape, torch.nan, device=rank.device)
        tokens, mask, target = (field.unsqueeze(1) for field in (batch.tokens, batch.mask, batch.target))
        return ComparisonBatch(tokens, mask, rank, unrated, target=target)
    if batch.target is None:
        raise ValueError(
            "the batch's `target` is None, so that nobody knows where responses begin: take it from "
            "`ComparisonDataModule`, or set the field to the mask of the responses' tokens, (B, K, L)"
        )
    return batch


def responses_of(batch: ComparisonBatch) -> TextBatch:
    """Return the N responses that are there as texts with targets, in the order of `batch.mask.any(2)`."""
    assert batch.target is not None
    there = batch.mask.any(2)
    return TextBatch(batch.tokens[there], batch.mask[there], batch.target[there])


class Mismatched(NamedTuple):
    """Responses to other prompts.

    Attributes:
        texts: prompt + response, (N, L).
        counts: texts that are a response to another prompt, (N,), bool; the others only keep passes equal.
    """

    texts: TextBatch
    counts: Tensor


def mismatched(batch: ComparisonBatch) -> Mismatched:
    """Join each prompt to the responses of the next one in the batch (Ethayarajh et al. 2024, §4.1).

    What would be longer than the batch is cut at its width, so that no text outgrows the network.

    Args:
        batch: B prompts, whose first response is always there.
    """
    assert batch.target is not None
    prompts, k = batch.rank.shape
    width = batch.tokens.shape[2]
    tokens, target = (field.roll(-1, 0).flatten(0, 1) for field in (batch.tokens, batch.target))
    own = batch.tokens[:, :1].expand(-1, k, -1).flatten(0, 1)
    first = batch.target.long().argmax(2)
    length = first[:, :1].expand(-1, k).flatten().unsqueeze(1)  # of the prompt
    start, size = target.long().argmax(1, keepdim=True), target.sum(1, keepdim=True)
    place = torch.arange(width, device=tokens.device).expand(len(tokens), -1)
    after = place >= length
    source = torch.where(after, start + place - length, place).clamp(max=width - 1)
    joined = torch.where(after, tokens.gather(1, source), own.gather(1, source))
    mask = place < (length + size).clamp(min=1)
    counts = (batch.rank.roll(-1, 0) >= 0).flatten() & (length > 0).squeeze(1)
    counts = counts & (batch.rank >= 0).any(1).repeat_interleave(k) & (prompts > 1)
    return Mismatched(TextBatch(joined, mask, mask & after & (place > 0)), counts)
