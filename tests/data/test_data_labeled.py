"""Responses with a label, and where responses begin in comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_rlhf.data import ColumnNames, ComparisonDataModule, LabeledDataModule
from lightning_rlhf.data.formats import label_of
from lightning_rlhf.types import LabeledBatch

ROWS = [
    {"prompt": "a b", "response": "c", "label": True},
    {"prompt": "d", "completion": "e f", "label": False},
    {"prompt": "g", "response": "h", "label": 1},
]


@pytest.fixture
def served(write: Any, plain: Any) -> Any:
    def serve(rows: Any = ROWS, **options: Any) -> list[LabeledBatch]:
        usual = {"batch_size": 2, "tokenizer": plain} | options
        data = LabeledDataModule(val=write("rows.jsonl", rows), **usual)
        data.setup("validate")
        (loader,) = data.val_dataloader()
        return list(loader)

    return serve


def test_rows_become_texts_with_their_label(served: Any) -> None:
    first, second = served()
    assert isinstance(first, LabeledBatch)
    assert first.tokens.tolist() == [[10, 11, 12, 0], [13, 14, 15, 0]]
    assert first.target.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert first.good.tolist() == [True, False]
    assert second.good.tolist() == [True]


@pytest.mark.parametrize(
    ("value", "good"), [(True, True), (1, True), ("True", True), ("0", False), (0, False), ("false", False)]
)
def test_labels_may_be_numbers_and_texts(value: Any, good: bool) -> None:
    assert label_of({"label": value}, ColumnNames()) is good
    assert label_of({"liked": value}, ColumnNames(label="liked")) is good


@pytest.mark.parametrize("value", ["good", 2, None, 0.5, [True]])
def test_other_labels_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`label` must be true .*`columns.label`"):
        label_of({"label": value}, ColumnNames())


def test_label_of_another_name_leaves_a_key_label_alone(served: Any) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": False, "liked": True}]
    (batch,) = served(rows, columns=ColumnNames(label="liked"))
    assert batch.good.tolist() == [True]


def test_rows_without_label_or_response_name_their_line(served: Any) -> None:
    with pytest.raises(ValueError, match="line 2: no key `label`"):
        served([ROWS[0], {"prompt": "a", "response": "b"}])
    with pytest.raises(ValueError, match="line 1: no key"):
        served([{"text": "a b", "label": True}])  # a document is no response


def test_over_long_rows_are_dropped(served: Any) -> None:
    (batch,) = served(max_tokens=3)
    assert batch.tokens.tolist() == [[16, 17, 0]]


def test_comparisons_know_where_their_responses_begin(write: Any, plain: Any) -> None:
    rows = [
        {"prompt": "a b", "responses": ["c", "d e", "f"], "ranks": [0, 1, 2]},
        {"prompt": "g", "chosen": "h", "rejected": ""},
    ]
    data = ComparisonDataModule(val=write("rows.jsonl", rows), tokenizer=plain, batch_size=2)
    data.setup("validate")
    ((batch,),) = data.val_dataloader()
    expected = torch.zeros(2, 3, 5, dtype=torch.bool)
    expected[0, 0, 2:4] = expected[0, 1, 2:5] = expected[0, 2, 2:4] = True
    expected[1, 0, 1:3] = expected[1, 1, 1:2] = True
    assert torch.equal(batch.target, expected)
