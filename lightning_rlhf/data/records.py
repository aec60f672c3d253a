"""Rows with their location and digest, and a strict reader of JSONL files."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, overload

from lightning_rlhf.text.characters import check_characters
from lightning_rlhf.types import Row

_KINDS = {
    b"\x1f\x8b": "a gzip file: end its name in .gz",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "a Parquet file: end its name in .parquet",
}
"""Magic bytes of files that are no JSONL."""
_BOM = b"\xef\xbb\xbf"


def parse_line(line: bytes, *, first: bool = False) -> dict[str, Any] | None:
    """Parse the object of a line; returns None if the line is blank.

    Args:
        line: UTF-8; a byte order mark is left out where it is `first`.
        first: whether the line begins its file.

    Raises:
        ValueError: it is no UTF-8, no JSON object, or one with a repeated key, a number that is not finite, or half of
            a surrogate pair.
    """
    if first:
        kind = next((kind for start, kind in _KINDS.items() if line.startswith(start)), None)
        if kind is not None:
            raise ValueError(f"this is {kind}")
        line = line.removeprefix(_BOM)
    text = _decoded(line)
    if not text:
        return None
    row = _loaded(text)
    if not isinstance(row, dict):
        raise ValueError(f"found a JSON {type(row).__name__}; each line needs one JSON object with named keys")
    if "\\ud" in text or "\\uD" in text:
        check_characters(json.dumps(row, ensure_ascii=False))
    return row


def _decoded(line: bytes) -> str:
    if b"\0" in line:
        raise ValueError("NUL bytes: the file is binary, or UTF-16; save it as UTF-8 text")
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error}); save the file as UTF-8") from error


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON ({error}); each line needs one whole JSON object, found {text[:80]!r}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"JSON nested too deeply, found {text[:40]!r}: flatten the row") from error


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"`{literal}` is no JSON: write null, or leave the row out")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"the number {literal[:40]} is too large: write a finite one")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice}` occurs twice: which value is meant? Remove one")
    return row


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


class HashedRecords(Sequence[Located]):
    """Records whose rows are hashed as they are read.

    Args:
        records: what is read.
    """

    def __init__(self, records: Sequence[Located]) -> None:
        self._records = records
        self._hash = hashlib.blake2b(digest_size=8)

    def __len__(self) -> int:
        """Number of rows in the records."""
        return len(self._records)

    @overload
    def __getitem__(self, place: int) -> Located: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Located]: ...

    def __getitem__(self, place: int | slice) -> Any:
        """Return a record without hashing it."""
        return self._records[place]

    def __iter__(self) -> Iterator[Located]:
        """Yield each record in order and hash its row."""
        for record in self._records:
            with record.located():
                self._hash.update(json.dumps(record.row, sort_keys=True, default=str).encode() + b"\n")
            yield record

    @property
    def digest(self) -> str:
        """Return the digest of all rows read so far."""
        return self._hash.hexdigest()


def digest_of_tokens(examples: Iterable[Any]) -> str:
    """Return the digest of the tokens of prompts, texts or comparisons."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        texts: Sequence[array[int]] = example.texts if hasattr(example, "texts") else [example.tokens]
        for tokens in texts:
            digest.update(len(tokens).to_bytes(4, "little") + tokens.tobytes())
    return digest.hexdigest()
