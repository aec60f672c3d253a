"""Collation of examples into one padded batch.

Each function takes the examples and, for each, whether it counts: one that does not is a repeat that fills the last
evaluation batch of a rank.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.data.examples import ComparisonExample, LabeledExample, PromptExample, TextExample
from lightning_rlhf.text import Tokens
from lightning_rlhf.types import ComparisonBatch, LabeledBatch, PromptBatch, TextBatch


def collate_prompts(
    examples: Sequence[PromptExample], counts: Sequence[bool], *, pad: int, name: str = ""
) -> PromptBatch:
    """Batch prompts of the held-out set `name`, padded on the left with `pad`."""
    tokens, mask = _padded([example.tokens for example in examples], pad, left=True)
    rows = [example.row for example in examples]
    is_real = torch.tensor(counts, dtype=torch.bool)
    return PromptBatch(tokens=tokens, mask=mask, is_real=is_real, rows=rows, name=name)


def collate_texts(examples: Sequence[TextExample], counts: Sequence[bool], *, pad: int) -> TextBatch:
    """Batch texts, padded on the right with `pad`; targets are the tokens after each context."""
    tokens, mask = _padded([example.tokens for example in examples], pad)
    context = torch.tensor([example.context for example in examples])
    predicted = torch.arange(mask.shape[1]) >= context[:, None]
    return TextBatch(
        tokens=tokens, mask=mask, target=mask & predicted & torch.tensor(counts, dtype=torch.bool)[:, None]
    )


def collate_comparisons(examples: Sequence[ComparisonExample], counts: Sequence[bool], *, pad: int) -> ComparisonBatch:
    """Batch ranked responses, padded on the right with `pad`; absent ones have rank -1.

    A filler's responses are all tied. A rating is NaN where a response is absent or its row has none.
    """
    k = max(len(example.texts) for example in examples)
    texts = [text for example in examples for text in [*example.texts, *[array("i")] * (k - len(example.texts))]]
    tokens, mask = _padded(texts, pad)
    rank = torch.full((len(examples), k), -1)
    for place, example, counted in zip(rank, examples, counts, strict=True):
        place[: len(example.ranks)] = torch.tensor(example.ranks) if counted else 0
    strength = torch.full(rank.shape, torch.nan)
    for rating, example in zip(strength, examples, strict=True):
        if example.strength is not None:
            rating[: len(example.strength)] = torch.tensor(example.strength)
    shape = (len(examples), k, tokens.shape[1])
    systems = [example.systems or [] for example in examples]
    target = _after_contexts(mask.view(shape), [example.contexts for example in examples])
    return ComparisonBatch(tokens.view(shape), mask.view(shape), rank, strength, systems, target)


def collate_labeled(examples: Sequence[LabeledExample], counts: Sequence[bool], *, pad: int) -> LabeledBatch:
    """Batch labeled responses, padded on the right with `pad`."""
    texts = collate_texts([example.text for example in examples], counts, pad=pad)
    return LabeledBatch(*texts, good=torch.tensor([example.good for example in examples], dtype=torch.bool))


def _after_contexts(mask: Tensor, contexts: Sequence[Sequence[int]]) -> Tensor | None:
    """Mask of the tokens after each response's prompt, (B, K, L); None if a row does not know its prompts."""
    if not all(contexts):
        return None
    starts = torch.zeros(mask.shape[:2], dtype=torch.int64)
    for start, known in zip(starts, contexts, strict=True):
        start[: len(known)] = torch.tensor(known)
    return mask & (torch.arange(mask.shape[2]) >= starts[:, :, None])


def _padded(rows: Sequence[Tokens], pad: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad the rows on one side, (B, L) int64; returns them with the mask of real tokens, (B, L) bool."""
    lengths = torch.tensor([len(row) for row in rows])
    columns = torch.arange(int(lengths.max()))
    mask = columns >= len(columns) - lengths[:, None] if left else columns < lengths[:, None]
    tokens = torch.full(mask.shape, pad)
    tokens[mask] = torch.tensor([token for row in rows for token in row])
    return tokens, mask
