"""Any bytes give rows or an error that names file and line; any rows give batches whose masks and lengths agree."""

from __future__ import annotations

import gzip
import json
import re
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.collate import collate_comparisons, collate_prompts, collate_texts
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import (
    ComparisonExample,
    PromptExample,
    TextExample,
    comparison_examples,
    demonstration_examples,
    pretraining_blocks,
    prompt_examples,
)
from lightning_rlhf.data.records import Record
from lightning_rlhf.data.sources import read_records
from lightning_rlhf.text import Encoder

SHARED = [HealthCheck.function_scoped_fixture]  # nothing is kept between examples
PIECES = [
    b'{"prompt": "a"}',
    b"\n",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"NaN",
    b"[",
    b'"',
    b"\xed\xa0\x80",
    b"{}",
    b"1",
]
BYTES = st.one_of(st.binary(max_size=60), st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join))
LEAF = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text("ab \ud800<", max_size=4)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "", 3]), "content": LEAF})
VALUE = LEAF | st.lists(LEAF | MESSAGE, max_size=3) | MESSAGE
KEYS = ["prompt", "response", "chosen", "rejected", "margin", "responses", "scores", "ranks", "text", "completions"]
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=6), min_size=1, max_size=3)
GOOD = {
    "prompt": st.sampled_from(["a", "a b c"]),
    "response": st.sampled_from(["", "a b"]),
    "responses": st.lists(st.sampled_from(["a", "b c", "d " * 9]), min_size=2, max_size=4),
}
READERS = [prompt_examples, demonstration_examples, comparison_examples]
TOKENS = st.lists(st.integers(0, 35), min_size=2, max_size=7).map(lambda ids: array("i", ids))


def tally() -> DropReport:
    return DropReport(name="train", limit_name="max_tokens", limit=8)


@settings(max_examples=150, deadline=None, suppress_health_check=SHARED)
@given(content=BYTES, name=st.sampled_from(["x.jsonl", "x.jsonl.gz"]), packed=st.booleans())
def test_any_bytes_give_rows_or_name_the_place(content: bytes, name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        records = read_records(str(path))
    except ValueError as error:
        place = rf"{re.escape(str(path))}(, line [1-9]\d*:| holds no record| is not a whole gzip file)"
        assert re.match(place, str(error)), error  # noqa: PT017
        return
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for record in records:
        text = lines[record.line - 1].decode()
        assert record.row == json.loads(text)
        json.dumps(record.row, allow_nan=False, ensure_ascii=False).encode()  # can be written back


@settings(max_examples=200, deadline=None, suppress_health_check=SHARED)
@given(rows=ROWS, reader=st.sampled_from(READERS))
def test_any_rows_give_examples_or_name_the_place(rows: list[dict[str, Any]], reader: Any, toy_tokenizer: Any) -> None:
    records = [Record(row=row, file="x.jsonl", line=line) for line, row in enumerate(rows, 1)]
    try:
        examples = reader(records, Encoder(toy_tokenizer), ColumnNames(), tally())
    except ValueError as error:
        assert re.match(r"x\.jsonl, line [1-3]: |no row is left", str(error)), error  # noqa: PT017
        return
    texts = [text for example in examples for text in getattr(example, "texts", [getattr(example, "tokens", None)])]
    assert texts
    assert all(1 <= len(text) <= 8 for text in texts)


@settings(max_examples=60, deadline=None, suppress_health_check=SHARED)
@given(rows=st.lists(st.fixed_dictionaries(GOOD), min_size=1, max_size=4), block=st.integers(2, 9))
def test_good_rows_lose_no_token(rows: list[dict[str, Any]], block: int, toy_tokenizer: Any) -> None:
    records = [Record(row={"text": row["prompt"]}, file="x", line=1) for row in rows]
    blocks = pretraining_blocks(records, Encoder(toy_tokenizer), ColumnNames(), block=block)
    tokens = sum(len(row["prompt"].split()) + 1 for row in rows)  # a token a word, and the end
    lost = 1 if tokens % block == 1 else 0  # a last block of one token has nothing to predict
    assert sum(len(example.tokens) for example in blocks) == tokens - lost


@given(st.lists(TOKENS, min_size=1, max_size=4), st.integers(0, 35))
def test_prompts_end_where_the_row_ends(rows: list[Any], pad: int) -> None:
    record = Record({"prompt": "a"}, "x", 1)
    batch = collate_prompts([PromptExample(row, record) for row in rows], [True] * len(rows), pad=pad)
    for tokens, mask, row in zip(batch.tokens, batch.mask, rows, strict=True):
        width = len(tokens) - len(row)
        assert mask.tolist() == [False] * width + [True] * len(row)
        assert tokens.tolist() == [pad] * width + list(row)


@given(st.data(), st.lists(TOKENS, min_size=1, max_size=4), st.integers(0, 35))
def test_texts_predict_what_is_after_the_context(data: Any, rows: list[Any], pad: int) -> None:
    contexts = [data.draw(st.integers(1, len(row))) for row in rows]
    counts = [data.draw(st.booleans()) for _ in rows]
    examples = [TextExample(row, context) for row, context in zip(rows, contexts, strict=True)]
    batch = collate_texts(examples, counts, pad=pad)
    for i, row in enumerate(rows):
        rest = batch.tokens.shape[1] - len(row)
        assert batch.tokens[i].tolist() == list(row) + [pad] * rest
        assert batch.mask[i].tolist() == [True] * len(row) + [False] * rest
        predicted = [counts[i] and place >= contexts[i] for place in range(len(row))]
        assert batch.target[i].tolist() == predicted + [False] * rest


@given(st.data(), st.lists(st.lists(TOKENS, min_size=2, max_size=4), min_size=1, max_size=3), st.integers(0, 35))
def test_absent_responses_have_no_rank_and_no_token(data: Any, rows: list[list[Any]], pad: int) -> None:
    ranks = [[data.draw(st.integers(0, 3)) for _ in row] for row in rows]
    counts = [data.draw(st.booleans()) for _ in rows]
    examples = [ComparisonExample(row, rank) for row, rank in zip(rows, ranks, strict=True)]
    batch = collate_comparisons(examples, counts, pad=pad)
    assert batch.tokens.shape[:2] == batch.rank.shape == (len(rows), max(map(len, rows)))
    assert torch.equal(batch.mask.any(2), batch.rank >= 0)
    for i, row in enumerate(rows):
        for k, text in enumerate(row):
            assert batch.tokens[i, k][batch.mask[i, k]].tolist() == list(text)
            assert batch.rank[i, k] == (ranks[i][k] if counts[i] else 0)


def test_the_pattern_of_places_can_fail() -> None:
    """The negative control of the expression that the first test trusts."""
    with pytest.raises(AssertionError):
        assert re.match(r"x\.jsonl, line [1-3]: ", "x.jsonl: somewhere")
