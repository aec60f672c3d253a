"""Sources of rows: files, the hub or Python objects."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rlhf.data.reasoning_gym import ReasoningGymRows, read_reasoning_gym
from lightning_rlhf.data.records import Located, read_lines, stream_lines
from lightning_rlhf.data.spreadsheets import read_cells
from lightning_rlhf.data.tables import (
    HubData,
    Table,
    hub_data,
    is_saved,
    read_hub,
    read_parquet,
    read_saved,
    table_records,
)

if TYPE_CHECKING:
    Made = HubData | ReasoningGymRows
    Source = str | Made | list[str | Made] | Table | None
else:  # what a config can hold; where it may also be a class, jsonargparse opens the data's path as another config
    Source = str | dict[str, Any] | list[str | dict[str, Any]] | None
"""An argument `train`, `val`, …: paths, hub data, rows of a task, several of these, or rows; None for nothing."""
_READERS: dict[str, Callable[[str], Sequence[Located]]] = {".parquet": read_parquet, ".csv": read_cells}
"""Reader by file suffix; any other file holds lines of JSON."""
FORMS = (
    "give the path of a JSONL (plain or .gz), Parquet or CSV file, a pattern such as 'data/*.jsonl', a folder that "
    "`save_to_disk` wrote, or a hub name with its split, OWNER/NAME:SPLIT"
)


def read_records(source: Any) -> Sequence[Located]:
    """Read the rows of a source in order; those of tables are read on access.

    Args:
        source: a path, a hub name, `HubData` or `ReasoningGymRows` (in a config mappings of their arguments), or
            several of these; or a `datasets.Dataset` or other sequence of mappings. A path with `*`, `?` or `[…]` that
            names no file is a pattern, read in sorted order.

    Returns:
        records, at least one.

    Raises:
        ValueError: something is missing, empty or broken; names the place.
        ImportError: `datasets` or `reasoning-gym` is needed and not installed.
        TypeError: it is none of these.
    """
    parts = [source] if _is_part(source) else source
    if isinstance(parts, list | tuple) and all(map(_is_part, parts)):
        if not parts or parts[0] == "" and len(parts) == 1:
            raise ValueError("no path was given: name at least one JSONL file")
        return [record for part in parts for record in _read_part(part)]
    return table_records(source)


def stream_records(path: str) -> Iterator[Located]:
    """Yield the rows of one path or pattern; JSONL is streamed, because it may exceed the memory.

    Raises:
        ValueError: as `read_records`; a JSONL file without records is none.
    """
    for place in _expand(path):
        yield from stream_lines(place) if _has_lines(place) else _read_place(place)


def _is_part(part: Any) -> bool:
    """Return True for a path, for hub data or a task and for their arguments; a row has other keys."""
    return isinstance(part, str | HubData | ReasoningGymRows) or _kind(part) is not None


def _kind(part: Any) -> type[HubData] | type[ReasoningGymRows] | None:
    """Return the class whose arguments a mapping holds."""
    if not isinstance(part, Mapping):
        return None
    if {"path", "split"} <= part.keys() <= {"path", "split", "name"}:
        return HubData
    return ReasoningGymRows if {"task"} <= part.keys() <= {each.name for each in fields(ReasoningGymRows)} else None


def _read_part(part: Any) -> Sequence[Located]:
    kind = _kind(part)
    part = part if kind is None else kind(**part)
    if isinstance(part, ReasoningGymRows):
        return read_reasoning_gym(part)
    data = part if isinstance(part, HubData) else hub_data(part)
    if data is not None:
        return read_hub(data)
    return [record for place in _expand(str(part)) for record in _read_place(place)]


def _expand(path: str) -> list[str]:
    """List the files or the saved dataset that a path or pattern names.

    Raises:
        ValueError: there are none.
    """
    path = expanduser(path)
    if Path(path).is_file() or is_saved(Path(path)):
        return [path]
    files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not files:
        kind = (
            "is a folder" if Path(path).is_dir() else "is no regular file" if Path(path).exists() else "does not exist"
        )
        raise ValueError(f"{path or repr(path)} {kind} (working directory {Path.cwd()}): {FORMS}")
    return files


def _read_place(place: str) -> Sequence[Located]:
    read = read_saved if Path(place).is_dir() else _READERS.get(Path(place).suffix, read_lines)
    return read(place)


def _has_lines(place: str) -> bool:
    return not Path(place).is_dir() and Path(place).suffix not in _READERS
