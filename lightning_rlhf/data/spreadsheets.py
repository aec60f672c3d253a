"""Reader of CSV files: every cell stays text, under the name in the first line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lightning_rlhf.data.records import LONGEST_LINE, Record


def read_cells(file: str) -> list[Record]:
    """Read the rows of a CSV file (UTF-8, commas, names in the first line) without their empty cells.

    Args:
        file: its path.

    Returns:
        records, each with the line that it begins in.

    Raises:
        ValueError: there is no row, a name occurs twice, or a row has not one cell per name; names file and line.
    """
    with open(file, encoding="utf-8-sig", newline="") as stream, _fields_of(LONGEST_LINE):
        lines = _lines(stream, file)
        first, names = next(lines, (1, []))
        if len(set(names) - {""}) < len(names) - names.count(""):
            twice = next(name for name in names if name and names.count(name) > 1)
            raise ValueError(f"{file}, line {first}: the column `{twice}` occurs twice: rename or remove one")
        names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]  # as pandas calls an index it wrote
        records = [Record(_row(names, cells, f"{file}, line {line}"), file, line) for line, cells in lines]
    if not records:
        raise ValueError(f"{file} holds no row: it needs names in its first line, such as prompt, and rows below")
    return records


def _row(names: list[str], cells: list[str], where: str) -> dict[str, str]:
    """Map names to cells; empty cells beyond the last name are ignored, because spreadsheets add them."""
    if len(cells) < len(names) or any(cells[len(names) :]):
        raise ValueError(
            f"{where}: {len(cells)} cells under {len(names)} names ({', '.join(names)[:200]}): put a text with a comma "
            'or a line break into double quotes ("a, b"), and write a comma for an empty cell'
        )
    return {name: cell for name, cell in zip(names, cells, strict=False) if cell}


def _lines(stream: Iterable[str], file: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row and the line it begins in, skipping blank rows."""
    reader, line = csv.reader(_texts(stream, file), strict=True), 1
    try:
        for cells in reader:
            if any(cells):
                yield line, cells
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, after line {reader.line_num}: not UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{file} can't be read as CSV: line {line}: {error}; write a text with double quotes in double "
            'quotes, each of its own twice ("a ""b"" c")'
        ) from error


def _texts(stream: Iterable[str], file: str) -> Iterator[str]:
    for text in stream:
        if "\0" in text:
            raise ValueError(f"{file} has NUL bytes: it is binary, or UTF-16; save it as UTF-8 text")
        yield text


@contextmanager
def _fields_of(size: int) -> Iterator[None]:
    """Context that allows cells of up to `size` characters."""
    before = csv.field_size_limit(size)
    try:
        yield
    finally:
        csv.field_size_limit(before)
