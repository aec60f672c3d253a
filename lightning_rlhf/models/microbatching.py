"""Grouping of rows of similar length into microbatches with little padding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.types import Rollout


def pieces_of(rollout: Rollout, *, rows: int | None, tokens: int | None, packed: bool = False) -> list[Tensor]:
    """Group the rows of a rollout into pieces, longest first; responses to one prompt stay together if they fit.

    Args:
        rollout: B responses.
        rows: the most rows of a piece; None sets no limit.
        tokens: the most tokens of a piece; a longer row is a piece of its own. None sets no limit.
        packed: count real tokens, and each prompt once; otherwise padding counts too, and each row has its prompt.

    Returns:
        row numbers, int64, that together are 0 to B − 1.
    """
    prompt, response, group = (x.tolist() for x in (rollout.prompt_lengths, rollout.extents, rollout.prompt_index))
    longest: dict[int, int] = {}
    for row, name in enumerate(group):
        longest[name] = max(longest.get(name, 0), prompt[row] + response[row])
    pieces: list[list[int]] = []
    widths = real = 0, 0
    for row in sorted(range(len(group)), key=lambda i: (-longest[group[i]], group[i])):
        own = prompt[row], response[row]
        wider = max(widths[0], own[0]), max(widths[1], own[1])
        size = len(pieces[-1]) + 1 if pieces else 1
        again = bool(pieces) and group[pieces[-1][-1]] == group[row]
        more = real[0] + (0 if again else own[0]), real[1] + own[1]
        needed = sum(more) if packed else size * sum(wider)
        if not pieces or (rows and size > rows) or (tokens and needed > tokens):
            pieces.append([])
            wider = more = own
        pieces[-1].append(row)
        widths, real = wider, more
    return [torch.tensor(piece, device=rollout.tokens.device) for piece in pieces]


def batches_of(mask: Tensor, *, tokens: int) -> list[tuple[Tensor, slice]]:
    """Group rows of similar length into batches, longest first with their columns.

    Args:
        mask: real tokens, (B, L), bool, one run in each row.
        tokens: the most tokens of a batch, padding included; a longer row is a batch of its own.

    Returns:
        row numbers, int64, that together are 0 to B − 1, and their columns.
    """
    first = mask.int().argmax(1).tolist()
    last = [start + length for start, length in zip(first, mask.sum(1).tolist(), strict=True)]
    batches: list[tuple[list[int], int, int]] = []
    for row in sorted(range(len(mask)), key=lambda i: first[i] - last[i]):
        rows, start, stop = batches[-1] if batches else ([], 0, tokens + 1)
        start, stop = min(start, first[row]), max(stop, last[row])
        if batches and (len(rows) + 1) * (stop - start) <= tokens:
            batches[-1] = [*rows, row], start, stop
        else:
            batches.append(([row], first[row], last[row]))
    return [(torch.tensor(rows, device=mask.device), slice(start, stop)) for rows, start, stop in batches]


def at_least(pieces: list[Tensor], count: int) -> list[Tensor]:
    """Split pieces until there are `count`: the largest is halved, and single rows are repeated.

    A repeated row is measured twice, which changes nothing; rows to learn from are as many on each process, so that
    there none is repeated.

    Args:
        pieces: row numbers, (b,), int64.
        count: how many there must be.
    """
    parts = list(pieces)
    while len(parts) < count:
        place = max(range(len(parts)), key=lambda i: len(parts[i]))
        largest = parts[place]
        parts[place : place + 1] = list(largest.tensor_split(2)) if len(largest) > 1 else [largest, largest]
    return parts
