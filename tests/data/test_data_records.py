from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lightning_rlhf.data.sources import read_records


def test_records_keep_order_place_and_every_key(tmp_path: Path) -> None:
    first, second = tmp_path / "b.jsonl", tmp_path / "a.jsonl"
    first.write_text('{"prompt": "é", "id": 7}\n\n   \n{"prompt": "y"}', encoding="utf-8")
    second.write_text('{"prompt": "z"}\n')
    records = read_records([str(first), str(second)])
    assert [(record.row, record.file, record.line) for record in records] == [
        ({"prompt": "é", "id": 7}, str(first), 1),
        ({"prompt": "y"}, str(first), 4),
        ({"prompt": "z"}, str(second), 1),
    ]


def test_gzip_and_plain_read_the_same(tmp_path: Path) -> None:
    text = '{"text": "ü"}\n{"text": "b"}\n'
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(text)
    plain, packed = (read_records(str(tmp_path / name)) for name in ("a.jsonl", "a.jsonl.gz"))
    assert [record.row for record in plain] == [record.row for record in packed] == [{"text": "ü"}, {"text": "b"}]


def test_pattern_reads_files_in_sorted_order(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}))
    records = read_records(str(tmp_path / "*.jsonl"))
    assert [record.row["prompt"] for record in records] == ["a", "b", "c"]


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_text('{"prompt": "right"}')
    (tmp_path / "x1.jsonl").write_text('{"prompt": "wrong"}')
    assert [record.row["prompt"] for record in read_records(str(tmp_path / "x[1].jsonl"))] == ["right"]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'{"prompt": "x"}\n{"prompt": \n', 2, "broken JSON .* one whole JSON object, found '{\"prompt\":'"),
        (b"\n[1, 2]\n", 2, "found a JSON list; each line needs one JSON object"),
        (b'"x"\n', 1, "found a JSON str"),
        (b'{"prompt": "x"}\n\n{"prompt": "\xff"}\n', 3, "not UTF-8 .* save the file as UTF-8"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line {line}: {message}"):
        read_records(str(path))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "empty.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no record: it needs one JSON object per line"):
        read_records([str(tmp_path / "good.jsonl"), str(tmp_path / "empty.jsonl")])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl does not exist .*give the path of a JSONL .*OWNER/NAME:SPLIT"):
        read_records(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        read_records(str(tmp_path))
    with pytest.raises(ValueError, match=r"\*\.jsonl does not exist"):
        read_records(str(tmp_path / "*.jsonl"))
    with pytest.raises(ValueError, match="no path was given"):
        read_records([])


def test_broken_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b'{"prompt": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read_records(str(path))
    path.write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 50)[:-6])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read_records(str(path))
