"""Rows that go through a network together: of similar length, so that little of it is padding."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.types import Rollout


def pieces_of(rollout: Rollout, *, rows: int | None, tokens: int | None) -> list[Tensor]:
    """Which rows make up each piece, longest first; responses to one prompt stay together as far as they fit.

    Args:
        rollout: B responses.
        rows: the most rows of a piece; None sets no limit.
        tokens: the most tokens of a piece, padding included; a longer row is a piece of its own. None sets no limit.

    Returns:
        row numbers, int64, that together are 0 to B − 1.
    """
    prompt, response, group = (x.tolist() for x in (rollout.prompt_lengths, rollout.lengths, rollout.prompt_index))
    longest: dict[int, int] = {}
    for row, name in enumerate(group):
        longest[name] = max(longest.get(name, 0), prompt[row] + response[row])
    found: list[list[int]] = []
    widths = 0, 0
    for row in sorted(range(len(group)), key=lambda i: (-longest[group[i]], group[i])):
        wider = max(widths[0], prompt[row]), max(widths[1], response[row])
        size = len(found[-1]) + 1 if found else 1
        if not found or (rows and size > rows) or (tokens and size * sum(wider) > tokens):
            found.append([])
            wider = prompt[row], response[row]
        found[-1].append(row)
        widths = wider
    return [torch.tensor(piece, device=rollout.tokens.device) for piece in found]


def batches_of(mask: Tensor, *, tokens: int) -> list[tuple[Tensor, slice]]:
    """Rows of similar length that go through a network together, longest first, and the columns that they use.

    Args:
        mask: real tokens, (B, L), bool, one run in each row.
        tokens: the most tokens of a batch, padding included; a longer row goes alone.

    Returns:
        row numbers, int64, that together are 0 to B − 1, and their columns.
    """
    first = mask.int().argmax(1).tolist()
    last = [start + length for start, length in zip(first, mask.sum(1).tolist(), strict=True)]
    found: list[tuple[list[int], int, int]] = []
    for row in sorted(range(len(mask)), key=lambda i: first[i] - last[i]):
        rows, start, stop = found[-1] if found else ([], 0, tokens + 1)
        start, stop = min(start, first[row]), max(stop, last[row])
        if found and (len(rows) + 1) * (stop - start) <= tokens:
            found[-1] = [*rows, row], start, stop
        else:
            found.append(([row], first[row], last[row]))
    return [(torch.tensor(rows, device=mask.device), slice(start, stop)) for rows, start, stop in found]


def at_least(pieces: list[Tensor], count: int) -> list[Tensor]:
    """The same rows in `count` pieces or more: the largest is halved, and where all are single rows, one comes again.

    A row that comes again is measured twice, which changes nothing; rows to learn from are as many on each process, so
    that there none has to.

    Args:
        pieces: row numbers, (b,), int64.
        count: how many there must be.
    """
    found = list(pieces)
    while len(found) < count:
        place = max(range(len(found)), key=lambda i: len(found[i]))
        largest = found[place]
        found[place : place + 1] = list(largest.tensor_split(2)) if len(largest) > 1 else [largest, largest]
    return found
