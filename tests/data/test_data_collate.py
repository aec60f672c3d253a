from __future__ import annotations

from array import array

import pytest
import torch

from lightning_rlhf.data.collate import collate_comparisons, collate_prompts, collate_texts
from lightning_rlhf.data.examples import ComparisonExample, PromptExample, TextExample
from lightning_rlhf.data.records import Record


def ids(*tokens: int) -> array[int]:
    return array("i", tokens)


@pytest.mark.parametrize("pad", [0, 9])
def test_prompts_are_padded_on_the_left(pad: int) -> None:
    rows = [Record({"prompt": "x", "id": 1}, "f", 1), Record({"prompt": "y"}, "f", 2)]
    examples = [PromptExample(ids(5, 0, 6), rows[0]), PromptExample(ids(7), rows[1])]
    batch = collate_prompts(examples, [True, False], pad=pad)
    assert batch.tokens.tolist() == [[5, 0, 6], [pad, pad, 7]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]  # a real 0 counts though 0 may be the pad
    assert batch.is_real.tolist() == [True, False]
    assert batch.rows == [{"prompt": "x", "id": 1}, {"prompt": "y"}]
    assert (batch.tokens.dtype, batch.mask.dtype, batch.is_real.dtype) == (torch.int64, torch.bool, torch.bool)


@pytest.mark.parametrize("pad", [0, 9])
def test_texts_are_padded_on_the_right_and_targets_follow_the_context(pad: int) -> None:
    examples = [TextExample(ids(5, 6, 7, 0), 2), TextExample(ids(8, 0), 1), TextExample(ids(5, 6, 0), 1)]
    batch = collate_texts(examples, [True, True, False], pad=pad)
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [8, 0, pad, pad], [5, 6, 0, pad]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.target.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.mask.dtype, batch.target.dtype) == (torch.int64, torch.bool, torch.bool)


@pytest.mark.parametrize("pad", [0, 9])
def test_ragged_comparisons_mark_what_is_absent(pad: int) -> None:
    examples = [
        ComparisonExample([ids(5, 0), ids(5, 6, 0)], [1, 0]),
        ComparisonExample([ids(7, 0), ids(7, 7, 0), ids(8, 0)], [0, 2, 1]),
    ]
    batch = collate_comparisons(examples, [True, True], pad=pad)
    assert batch.tokens.tolist() == [
        [[5, 0, pad], [5, 6, 0], [pad, pad, pad]],
        [[7, 0, pad], [7, 7, 0], [8, 0, pad]],
    ]
    assert batch.mask.int().tolist() == [[[1, 1, 0], [1, 1, 1], [0, 0, 0]], [[1, 1, 0], [1, 1, 1], [1, 1, 0]]]
    assert batch.rank.tolist() == [[1, 0, -1], [0, 2, 1]]
    assert (batch.tokens.dtype, batch.mask.dtype, batch.rank.dtype) == (torch.int64, torch.bool, torch.int64)


def test_ratings_are_nan_where_there_is_none() -> None:
    texts = [ids(5, 0), ids(6, 0), ids(7, 0)]
    examples = [
        ComparisonExample(texts, [0, 1, 2], [7.5, 2.0, -1.0]),
        ComparisonExample(texts[:2], [0, 1], [1.0, 0.0]),
        ComparisonExample(texts[:2], [1, 0]),
    ]
    batch = collate_comparisons(examples, [True, True, True], pad=0)
    nan = torch.nan
    expected = torch.tensor([[7.5, 2.0, -1.0], [1.0, 0.0, nan], [nan, nan, nan]])
    torch.testing.assert_close(batch.strength, expected, rtol=0, atol=0, equal_nan=True)
    assert batch.strength.dtype == torch.float32


def test_names_of_systems_are_the_rows_own() -> None:
    texts = [ids(5, 0), ids(6, 0), ids(7, 0)]
    named = ComparisonExample(texts, [0, 1, 2], systems=["x", "y", "x"])
    batch = collate_comparisons([named, ComparisonExample(texts[:2], [0, 1])], [True, True], pad=0)
    assert batch.systems == [["x", "y", "x"], []]


def test_filler_comparison_is_all_tied() -> None:
    examples = [ComparisonExample([ids(5), ids(6), ids(7)], [0, 1, 2]), ComparisonExample([ids(5), ids(6)], [1, 0])]
    batch = collate_comparisons(examples, [True, False], pad=0)
    assert batch.rank.tolist() == [[0, 1, 2], [0, 0, -1]]
