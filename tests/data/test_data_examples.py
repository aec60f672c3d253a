from __future__ import annotations

import logging
from typing import Any

import pytest

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import (
    comparison_examples,
    demonstration_examples,
    pretraining_blocks,
    prompt_examples,
)
from lightning_rlhf.data.records import Record
from lightning_rlhf.text.encoder import Encoder

# a is 10, b is 11, c is 12, d is 13; </s> 0


def records(*rows: dict[str, Any]) -> list[Record]:
    return [Record(row, "f.jsonl", line) for line, row in enumerate(rows, start=1)]


def tally(limit: int = 100, name: str = "train") -> DropReport:
    return DropReport(name=name, limit_name="max_tokens", limit=limit)


def test_prompts_over_the_limit_are_dropped_and_counted(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    count = tally(limit=2)
    rows = records({"prompt": "a b", "id": 1}, {"prompt": "a b c"}, {"prompt": "c"}, {"prompt": "a b c d"})
    with caplog.at_level(logging.WARNING):
        examples = prompt_examples(rows, Encoder(plain), ColumnNames(), count)
    assert [example.tokens.tolist() for example in examples] == [[10, 11], [12]]
    assert [example.row for example in examples] == [{"prompt": "a b", "id": 1}, {"prompt": "c"}]
    assert (count.rows, count.dropped, count.longest) == (4, 2, 4)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "`train`: dropped 2 of 4 rows longer than max_tokens=2 tokens; the longest was 4" in message
    assert "raise `max_tokens`" in message


def test_enormous_texts_are_dropped_before_they_are_tokenized(
    plain: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge, encoder, lengths = "a " * (2**19 + 2), Encoder(plain), []
    encode = encoder._encode
    monkeypatch.setattr(
        encoder, "_encode", lambda text, **options: lengths.append(len(text)) or encode(text, **options)
    )
    asked: Any = [{"role": "user", "content": huge}]
    cases: list[tuple[Any, Any, list[Any]]] = [
        (prompt_examples, {"prompt": "a"}, [{"prompt": huge}, {"prompt": asked}]),
        (demonstration_examples, {"prompt": "a", "response": "b"}, [{"prompt": "a", "response": huge}, {"text": huge}]),
        (
            comparison_examples,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            [{"prompt": "a", "chosen": "b", "rejected": huge}, {"prompt": huge, "chosen": "b", "rejected": "c"}],
        ),
    ]
    for read, good, long in cases:
        count, seen = tally(limit=9), len(caplog.records)
        with caplog.at_level(logging.WARNING):
            assert len(read(records(good, *long), encoder, ColumnNames(), count)) == 1
        assert (count.rows, count.long_rows) == (3, 2)
        assert "dropped 2 of 3 rows" in caplog.records[seen].getMessage()
        assert f"{count.uncounted} others had more than 1048576 characters" in caplog.records[seen].getMessage()
    assert max(lengths) == 1


def test_long_texts_are_counted_where_the_limit_may_allow_them(plain: Any) -> None:
    text = "a" + " " * 2**20 + "b"
    (example,) = prompt_examples(records({"prompt": text}), Encoder(plain), ColumnNames(), tally(limit=2**15))
    assert example.tokens.tolist() == [10, 11]


def test_nothing_dropped_is_silent(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    prompt_examples(records({"prompt": "a b"}), Encoder(plain), ColumnNames(), tally(limit=2))
    assert not caplog.records


def test_no_row_left_is_an_error(plain: Any) -> None:
    with pytest.raises(ValueError, match="no row is left. `train`: dropped 1 of 1 rows longer than max_tokens=1"):
        prompt_examples(records({"prompt": "a b"}), Encoder(plain), ColumnNames(), tally(limit=1))
    tied = records({"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]})
    with pytest.raises(ValueError, match="no row is left. `train`: dropped 1 of 1 rows whose responses are all tied"):
        comparison_examples(tied, Encoder(plain), ColumnNames(), tally())


def test_demonstration_is_prompt_response_end(opening: Any) -> None:
    rows = records({"prompt": "a b", "response": "c"})
    (example,) = demonstration_examples(rows, Encoder(opening), ColumnNames(), tally())
    assert (example.tokens.tolist(), example.context) == ([1, 10, 11, 12, 0], 3)
    (example,) = demonstration_examples(rows, Encoder(opening), ColumnNames(), tally(), loss_on_prompt=True)
    assert (example.tokens.tolist(), example.context) == ([1, 10, 11, 12, 0], 1)


def test_demonstration_limit_counts_the_end_token(plain: Any) -> None:
    rows = records({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b c"})
    count = tally(limit=3)
    examples = demonstration_examples(rows, Encoder(plain), ColumnNames(), count)
    assert [example.tokens.tolist() for example in examples] == [[10, 11, 0]]
    assert count.dropped == 1


def test_scores_rank_downwards_and_ties_share_a_rank(plain: Any) -> None:
    rows = records(
        {"prompt": "a", "responses": ["b", "c", "d", "e"], "scores": [0.1, 0.9, 0.1, -3]},
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [10, 5, 10]},
    )
    first, second = comparison_examples(rows, Encoder(plain), ColumnNames(), tally())
    assert [text.tolist() for text in first.texts] == [[10, 11, 0], [10, 12, 0], [10, 13, 0], [10, 14, 0]]
    assert first.ranks == [1, 0, 1, 2]
    assert second.ranks == [1, 0, 1]
    assert (first.strength, second.strength) == ([0.1, 0.9, 0.1, -3], None)


def test_long_responses_are_dropped_before_rows(plain: Any, caplog: pytest.LogCaptureFixture) -> None:
    count = tally(limit=3)
    rows = records(
        # the best goes: the others close up
        {"prompt": "a", "responses": ["b b", "c", "d"], "scores": [9, 5, 7], "systems": ["x", "y", "z"]},
        {"prompt": "a", "responses": ["b b", "c c", "d"], "scores": [9, 5, 7]},  # one is left: nothing to compare
        {"prompt": "a", "responses": ["b b", "c", "d"], "scores": [9, 5, 5]},  # the two left are tied
    )
    with caplog.at_level(logging.WARNING):
        (example,) = comparison_examples(rows, Encoder(plain), ColumnNames(), count)
    assert [text.tolist() for text in example.texts] == [[10, 12, 0], [10, 13, 0]]
    assert (example.ranks, example.strength, example.systems) == ([1, 0], [5, 7], ["y", "z"])
    assert (count.rows, count.long_rows, count.tied_rows, count.dropped) == (3, 1, 1, 2)
    assert (count.responses, count.long_responses, count.longest) == (9, 4, 4)
    message = caplog.records[0].getMessage()
    assert "dropped 1 of 3 rows and 4 of 9 responses longer than max_tokens=3" in message
    assert "dropped 1 of 3 rows whose responses are all tied" in message


@pytest.mark.parametrize("block", [2, 3, 4, 7, 50])
def test_blocks_lose_nothing(plain: Any, block: int) -> None:
    rows = records({"text": "a b c"}, {"text": "d"}, {"text": "e f"})
    stream = [10, 11, 12, 0, 13, 0, 14, 15, 0]
    blocks = [
        example.tokens.tolist() for example in pretraining_blocks(rows, Encoder(plain), ColumnNames(), block=block)
    ]
    expected = [stream[start : start + block] for start in range(0, 9, block)]
    assert blocks == [tokens for tokens in expected if len(tokens) > 1]  # a single token has nothing before it
    assert sum(map(len, blocks)) == (8 if block in (2, 4) else 9)


def test_documents_open_and_end_as_the_tokenizer_does(opening: Any) -> None:
    (block,) = pretraining_blocks(records({"text": "a"}, {"text": "b"}), Encoder(opening), ColumnNames(), block=9)
    assert (block.tokens.tolist(), block.context) == ([1, 10, 0, 1, 11, 0], 1)


def test_too_little_text_is_an_error(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl holds 1 tokens of text: at least 2"):
        pretraining_blocks(records({"text": ""}), Encoder(plain), ColumnNames(), block=8)


@pytest.mark.parametrize("margin", ["much", -2, float("nan")])
def test_error_of_a_margin_names_file_and_line(plain: Any, margin: Any) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}
    with pytest.raises(ValueError, match=r"^f\.jsonl, line 2: `margin` must"):
        comparison_examples(records(good, good | {"margin": margin}), Encoder(plain), ColumnNames(), tally())


@pytest.mark.parametrize("read", [prompt_examples, demonstration_examples, comparison_examples])
def test_errors_name_file_and_line(plain: Any, read: Any) -> None:
    good = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}
    with pytest.raises(ValueError, match=r"^f\.jsonl, line 2: .*\['question'\]"):
        read(records(good, {"question": "a"}), Encoder(plain), ColumnNames(), tally())
    with pytest.raises(ValueError, match=r"^f\.jsonl, line 2: .*has no tokens"):
        read(records(good, good | {"prompt": ""}), Encoder(plain), ColumnNames(), tally())


def test_error_of_a_document_names_file_and_line(plain: Any) -> None:
    with pytest.raises(ValueError, match=r"^f\.jsonl, line 2: no key `text`"):
        pretraining_blocks(records({"text": "a"}, {"body": "a"}), Encoder(plain), ColumnNames(), block=8)


def test_error_inside_a_template_names_the_place(chat: Any) -> None:
    chat.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"f\.jsonl, line 1.*no system role"):
        prompt_examples(
            records({"prompt": [{"role": "system", "content": "a"}]}), Encoder(chat), ColumnNames(), tally()
        )
