"""Rows with their location, and a reader of JSONL files."""

from __future__ import annotations

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning_rlhf.data.parsing import parse_line
from lightning_rlhf.types import Row

LONGEST_LINE = 2**26
"""Most bytes of a line. A file without line breaks, or one that unpacks without end, must not fill the memory."""


class Located(ABC):
    """A row with its location.

    Attributes:
        row: the row as it stood there.
        file: the file, or the name of the table.
    """

    __slots__ = ()
    row: Row
    file: str

    @property
    @abstractmethod
    def where(self) -> str:
        """Location of the row for errors."""

    @contextmanager
    def located(self) -> Iterator[None]:
        """Context that puts the location of this row in front of errors raised inside.

        Raises:
            ValueError: the one raised inside, now naming the place; other errors carry the place as a note.
        """
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {self.where}")
            raise


@dataclass(frozen=True, slots=True)
class Record(Located):
    """One JSON object with its location in a file.

    Attributes:
        row: the object as it stood in the file.
        file: path of the file.
        line: line number, from 1.
    """

    row: Row
    file: str
    line: int

    @property
    def where(self) -> str:
        """Location as `file, line n`."""
        return f"{self.file}, line {self.line}"


def stream_lines(file: str) -> Iterator[Record]:
    """Yield the records of a JSONL file (UTF-8, `.gz` or plain) in order, skipping blank lines.

    Raises:
        ValueError: a line is not UTF-8, not JSON or not an object; names file and line.
    """
    for number, line in _lines(file):
        record = _parse(line, file, number)
        if record is not None:
            yield record


def read_lines(file: str) -> list[Record]:
    """Read all records of a JSONL file as `stream_lines` yields them.

    Raises:
        ValueError: it is empty, or a line is not UTF-8, not JSON or not an object; names file and line.
    """
    records = list(stream_lines(file))
    if not records:
        raise ValueError(f'{file} holds no record: it needs one JSON object per line, for example {{"prompt": "Hi"}}')
    return records


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rb") as stream:
        try:
            yield from enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), start=1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file} is not a whole gzip file ({error}): copy it again, or drop .gz from its name"
            ) from error


def _parse(line: bytes, file: str, number: int) -> Record | None:
    where = f"{file}, line {number}"
    if len(line) > LONGEST_LINE:
        raise ValueError(
            f"{where}: longer than {LONGEST_LINE} bytes, which no row of text is: put each JSON object on its own line"
        )
    try:
        row = parse_line(line, first=number == 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return None if row is None else Record(row=row, file=file, line=number)
