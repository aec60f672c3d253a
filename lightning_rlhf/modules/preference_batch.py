"""Batches of the preference stage: one shape for rankings and labels, and mismatched pairs for KTO."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlhf.distributed.ranks import Ranks
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


def mismatched(batch: ComparisonBatch, ranks: Ranks) -> Mismatched:
    """Join each prompt to the responses of the next one in the batch of all processes (Ethayarajh et al. 2024, §4.1).

    What would be longer than that batch is cut at its width, so that no text outgrows the network. All processes must
    call this.

    Args:
        batch: B prompts of this process, whose first response is always there; prompt i of it is prompt
            i·world + rank of the whole batch. One without a response of rank 0 or more is passed over.
        ranks: the processes.

    Returns:
        B·K texts, with K the most responses to a prompt of the whole batch.
    """
    following, own = _with_following(batch, ranks)
    k, width = following.rank.shape[1], following.tokens.shape[2]
    before = own.tokens[:, :1].expand(-1, k, -1).flatten(0, 1)
    tokens, target = following.tokens.flatten(0, 1), following.target.flatten(0, 1)
    length = own.target[:, :1].long().argmax(2).expand(-1, k).flatten().unsqueeze(1)  # of the prompt
    start, size = target.long().argmax(1, keepdim=True), target.sum(1, keepdim=True)
    place = torch.arange(width, device=tokens.device).expand(len(tokens), -1)
    after = place >= length
    source = torch.where(after, start + place - length, place).clamp(max=width - 1)
    joined = torch.where(after, tokens.gather(1, source), before.gather(1, source))
    mask = place < (length + size).clamp(min=1)
    is_other = (own.rank >= 0).any(1) & (following.place != own.place).squeeze(1)
    counts = (following.rank >= 0) & is_other.unsqueeze(1) & (length > 0).view(-1, k)
    return Mismatched(TextBatch(joined, mask, mask & after & (place > 0)), counts.flatten())


class _Packed(NamedTuple):
    """Columns of a batch that one collective carries.

    Attributes:
        tokens: (B, K, L), int64.
        target: (B, K, L), bool.
        rank: (B, K), −1 where a response is absent.
        place: number of each prompt in the batch of all processes, (B, 1).
    """

    tokens: Tensor
    target: Tensor
    rank: Tensor
    place: Tensor


def _with_following(batch: ComparisonBatch, ranks: Ranks) -> tuple[_Packed, _Packed]:
    """Return for each prompt the next one of the whole batch with a ranked response, then the prompts themselves.

    Both have the widths of the whole batch. The next to the only prompt is itself.
    """
    assert batch.target is not None
    prompts, k, width = batch.tokens.shape
    more, wider = ranks.largest(k) - k, ranks.largest(width) - width
    place = torch.arange(prompts, device=batch.rank.device) * ranks.world + ranks.rank
    columns = [
        pad(batch.tokens, (0, wider, 0, more)),
        pad(batch.target.long(), (0, wider, 0, more)),
        pad(batch.rank, (0, more), value=-1).unsqueeze(2),
        place.view(-1, 1, 1).expand(-1, k + more, 1),
    ]
    own = torch.cat(columns, 2)
    whole = ranks.gather(own).to(own.device)
    rows = _unpacked(whole)
    there = (rows.rank >= 0).any(1).nonzero().squeeze(1)
    if len(there) == 0:
        return _unpacked(own), _unpacked(own)
    there = there[rows.place[there].squeeze(1).argsort()]
    later = torch.searchsorted(rows.place[there].squeeze(1), place, right=True)
    return _unpacked(whole[there[later % len(there)]]), _unpacked(own)


def _unpacked(columns: Tensor) -> _Packed:
    width = (columns.shape[2] - 2) // 2
    tokens, target = columns[..., :width], columns[..., width : 2 * width].bool()
    return _Packed(tokens, target, columns[..., -2], columns[:, :1, -1])
