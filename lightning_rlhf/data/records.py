"""Records of JSONL files, each with the place it was read from."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_rlhf.data.parsing import parse_line
from lightning_rlhf.types import Row

LONGEST_LINE = 2**26
"""Bytes. A file without line breaks, or one that unpacks without end, must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and where it stood.

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
        """`file, line n`: how every error names this record."""
        return f"{self.file}, line {self.line}"

    @contextmanager
    def located(self) -> Iterator[None]:
        """Errors raised inside, with the place of this record in front.

        Raises:
            ValueError: the one raised inside, now naming file and line; other errors carry the place as a note.
        """
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        except Exception as error:
            error.add_note(f"while reading {self.where}")
            raise


def read_records(paths: str | list[str]) -> list[Record]:
    """The records of JSONL files (UTF-8, `.gz` or plain), in the order of the paths and lines; blank lines are skipped.

    Args:
        paths: one path or several; a path with `*`, `?` or `[…]` that names no file is a pattern, read in sorted order.

    Returns:
        records, at least one.

    Raises:
        ValueError: a missing or empty file, a line that is not UTF-8, not JSON or not an object; names file and line.
    """
    if not paths:
        raise ValueError("no path was given: name at least one JSONL file")
    files = [file for path in ([paths] if isinstance(paths, str) else paths) for file in _expand(path)]
    return [record for file in files for record in _read_file(file)]


def _expand(path: str) -> list[str]:
    if Path(path).is_file():
        return [path]
    found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not found:
        kind = (
            "is a folder" if Path(path).is_dir() else "is no regular file" if Path(path).exists() else "does not exist"
        )
        raise ValueError(
            f"{path or repr(path)} {kind} (working directory {Path.cwd()}): give the path of a JSONL file, plain or "
            ".gz, or a pattern such as 'data/*.jsonl'"
        )
    return found


def stream_records(file: str) -> Iterator[Record]:
    """The records of one file, one at a time: for what is too long for memory.

    Raises:
        ValueError: as `read_records`; a file without records is none.
    """
    for path in _expand(file):
        for number, line in _lines(path):
            record = _parse(line, path, number)
            if record is not None:
                yield record


def _read_file(file: str) -> list[Record]:
    records = list(stream_records(file))
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
