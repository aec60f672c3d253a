"""Cells of CSV files: each the text it was, under its own name, or an error that names file and line."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.data import ComparisonDataModule
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.formats import demonstration_of
from lightning_rlhf.data.sources import read_records, stream_records

READ: dict[str, tuple[str, list[dict[str, str]]]] = {
    "a trailing comma": (
        "prompt,answer\na b,yes,\nc d,no,\n",
        [{"prompt": "a b", "answer": "yes"}, {"prompt": "c d", "answer": "no"}],
    ),
    "a trailing comma in the header": ("prompt,answer,\na,yes,\n", [{"prompt": "a", "answer": "yes"}]),
    "an index that pandas wrote": (",prompt\n0,a\n", [{"Unnamed: 0": "0", "prompt": "a"}]),
    "texts like numbers": (
        "prompt,x\n007,1.0\n1e5,0x1\n",
        [{"prompt": "007", "x": "1.0"}, {"prompt": "1e5", "x": "0x1"}],
    ),
    "texts like constants": ("a,b,c,d\nNA,null,true,nan\n", [{"a": "NA", "b": "null", "c": "true", "d": "nan"}]),
    "empty cells": ('a,b,c\n1,,""\n', [{"a": "1"}]),
    "spaces": ("a,b\n x , \n", [{"a": " x ", "b": " "}]),
    "a byte order mark": ("\ufeffprompt\na\n", [{"prompt": "a"}]),
    "quotes": ('a,b\n"x, ""y""\nz",w"w\n', [{"a": 'x, "y"\nz', "b": 'w"w'}]),
    "Windows line breaks": ('a,b\r\n1,"2\r\n3"\r\n', [{"a": "1", "b": "2\r\n3"}]),
    "old Macintosh line breaks": ("a,b\r1,2\r", [{"a": "1", "b": "2"}]),
    "blank lines": ("\n\na,b\n,\n1,\n,,\n", [{"a": "1"}]),
    "a long cell": (f"a\n{'x' * 200_000}\n", [{"a": "x" * 200_000}]),
}
REFUSED = {
    "surplus cells": (
        b"prompt,answer\na b,yes\nhello, world,yes\n",
        "line 3: 3 cells under 2 names .prompt, answer.: put",
    ),
    "surplus cells in all rows": (b"prompt,answer\n1,a,yes\n2,b,no\n", "line 2: 3 cells under 2 names"),
    "missing cells": (b'prompt,answer\n"a\n\nb",yes\nc\n', "line 5: 1 cells under 2 names"),
    "a name twice": (b"prompt,answer,prompt\na,b,c\n", "line 1: the column `prompt` occurs twice"),
    "no rows": (b"prompt,answer\n", "holds no row"),
    "nothing": (b"", "holds no row"),
    "an open quote": (b'prompt,answer\na,b\n"c,d\ne,f\n', "can't be read as CSV: line 3: unexpected end of data"),
    "text after a quote": (b'prompt,answer\n"c" d,e\n', "can't be read as CSV: line 2: ',' expected after"),
    "Latin-1": (b"prompt\n\xe4\n", "not UTF-8"),
    "UTF-16": ("prompt\na\n".encode("utf-16-le"), "NUL bytes"),
}


@pytest.mark.parametrize(("text", "expected"), READ.values(), ids=READ)
def test_cells_are_the_texts_that_were_written(text: str, expected: list[dict[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode())
    assert [record.row for record in read_records(str(path))] == expected
    assert [record.row for record in stream_records(str(path))] == expected


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_cells_that_fit_no_name_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.csv.*{message}"):
        read_records(str(tmp_path / "rows.csv"))


def test_line_of_a_cell_is_where_its_row_begins(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('a,b\n"1\n\n2",3\n\n4,5\n')
    assert [record.where.rpartition(", ")[2] for record in read_records(str(tmp_path / "rows.csv"))] == [
        "line 2",
        "line 6",
    ]


def test_limit_of_cells_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("a\n1\n")
    read_records(str(tmp_path / "rows.csv"))
    assert csv.field_size_limit() == before


def test_numbers_and_labels_of_cells_count(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,margin\na,b,c,1.5\na,d,e,\n")
    data = ComparisonDataModule(str(tmp_path / "rows.csv"), tokenizer=plain)
    data.setup("fit")
    assert [example.strength for example in data._examples["train"]] == [[1.5, 0.0], None]
    with pytest.raises(ValueError, match="`label` is false"):
        demonstration_of({"prompt": "a", "completion": "b", "label": "False"}, ColumnNames())
