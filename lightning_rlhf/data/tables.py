"""Rows of sequences of mappings and of Arrow datasets, also from the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_rlhf.data.records import Located
from lightning_rlhf.types import Row

_NAMED = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<split>\w[\w.+%:\[\]-]*)")


@dataclass(frozen=True, kw_only=True)
class HubData:
    """One split of a dataset for `datasets.load_dataset`, the only source of rows that may use the network.

    Args:
        path: OWNER/NAME on the hub, or a folder that holds a copy of such a dataset.
        split: which part, such as `train`, `train_sft` or `train[:1000]`.
        name: its configuration, where it has several.
    """

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        """Format as `OWNER/NAME:SPLIT` for errors, with `/CONFIGURATION` if there is one."""
        return f"{self.path}{f'/{self.name}' if self.name else ''}:{self.split}"


def hub_data(source: str) -> HubData | None:
    """Parse `OWNER/NAME:SPLIT`; returns None if `source` is a path.

    A source is a path if it has another form, if it exists or if OWNER is a local folder. Otherwise a misspelt path
    would ask the network.
    """
    match = _NAMED.fullmatch(source)
    if match is None or Path(source).exists() or Path(match["path"]).parent.is_dir():
        return None
    return HubData(path=match["path"], split=match["split"])


Table = Sequence[Mapping[str, Any]]
GIVEN = "the given rows"


@dataclass(frozen=True, slots=True)
class TableRecord(Located):
    """A row that is fetched on each access, so that a table may exceed the memory.

    Attributes:
        table: rows by number.
        file: path of the table, or its name.
        index: row number, from 0, as `datasets` counts.
    """

    table: Table
    file: str
    index: int

    @property
    def row(self) -> Row:  # type: ignore[override]
        """The row without its empty cells, because in a table every row has every column.

        Raises:
            ValueError: it is no mapping with text keys.
        """
        row = self.table[self.index]
        if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
            raise ValueError(f"each row must be a mapping with named keys, found {type(row).__name__}: {str(row)[:80]}")
        return {key: _filled(value) for key, value in row.items() if value is not None}

    @property
    def where(self) -> str:
        """Location as `file, row n`."""
        return f"{self.file}, row {self.index}"


def table_records(table: Any, name: str = GIVEN) -> list[TableRecord]:
    """Build a record for each row of a table; the rows stay in it.

    Args:
        table: a `datasets.Dataset`, or another sequence of mappings.
        name: what errors call it.

    Raises:
        TypeError: it is no sequence of rows.
        ValueError: it is empty.
    """
    kind = type(table).__name__
    if isinstance(table, Mapping):
        parts = sorted(map(str, table))
        raise TypeError(f"{name} are a {kind} with the parts {parts}: give one of them, as in data[{parts[0]!r}]")
    if not (hasattr(table, "__len__") and hasattr(table, "__getitem__")) or hasattr(table, "iloc"):
        raise TypeError(
            f"{name} are a {kind}, which has no rows by number: give a datasets.Dataset or a list of dictionaries; "
            "of a stream, list(stream.take(n)); of a data frame, datasets.Dataset.from_pandas(frame)"
        )
    if len(table) == 0:
        raise ValueError(f"{name} hold no row: give at least one")
    if hasattr(table, "with_format"):  # Dataset.set_format would turn cells into tensors
        table = table.with_format(None)
    return [TableRecord(table, name, index) for index in range(len(table))]


def read_parquet(file: str) -> list[TableRecord]:
    """Read the rows of a Parquet file through the memory-mapped copy that `datasets` caches.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: the file is no Parquet, or has no row.
    """
    library = _library(file)
    with _loading(file, "Parquet"):
        table = _stored(library.Dataset.from_parquet(file))
    return table_records(table, file)


def is_saved(folder: Path) -> bool:
    """Return True if `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_saved(folder: str) -> list[TableRecord]:
    """Read the rows of a folder that `save_to_disk` wrote, memory-mapped.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: it holds several splits, none of which was named, or can't be read.
    """
    library = _library(folder)
    with _loading(folder, "a saved dataset"):
        table = library.load_from_disk(folder)
    if isinstance(table, Mapping):
        splits = ", ".join(str(Path(folder) / split) for split in table)
        raise ValueError(f"{folder} holds several splits: give one of {splits}")
    with _loading(folder, "a saved dataset"):
        table = _stored(table)
    return table_records(table, folder)


def read_hub(data: HubData) -> list[TableRecord]:
    """Read the rows of a split from the hub or from the cache of an earlier run.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such dataset, configuration or split, or it can't be reached.
    """
    library = _library(str(data))
    with _loading(str(data), "a dataset"):
        table = _stored(library.load_dataset(data.path, data.name, split=data.split))
    return table_records(table, str(data))


def _library(wanted: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"reading {wanted} needs `datasets`: pip install datasets, or write the rows as JSONL"
        ) from error
    return datasets


def _stored(table: Any) -> Any:
    """Return the table with images and sounds in their stored form, `{"bytes", "path"}`.

    Because decoding opens the path of each when its row is read, a path of another machine would fail.
    """
    for column, feature in table.features.items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            table = table.cast_column(column, undecoded)
    return table


def _undecoded(feature: Any) -> Any:
    """Copy a feature of `datasets` without decoding anything in it."""
    if isinstance(feature, Mapping):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":  # that is text, which names no file
        return replace(feature, decode=False)
    return replace(feature, feature=_undecoded(feature.feature)) if hasattr(feature, "feature") else feature


@contextmanager
def _loading(name: str, kind: str) -> Any:
    """Context that turns errors of `datasets` and pyarrow into one sentence.

    Raises:
        ValueError: the block raised.
    """
    try:
        yield
    except Exception as error:  # its own kinds, pyarrow's, pandas', the operating system's, the network's
        cause = error.__cause__ or error
        raise ValueError(f"{name} can't be read as {kind}: {' '.join(str(cause).split())[:300]}") from error


def _filled(value: Any) -> Any:
    """Drop the None values that Arrow adds to structs whose keys differ within a column."""
    if isinstance(value, Mapping):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list | tuple) else value
