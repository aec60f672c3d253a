"""Readers of logs whose last line may be incomplete, while any other broken line is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield each line's number (from 1), its text and False if its line break is missing.

    Raises:
        ValueError: a line is not UTF-8.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            whole = line.endswith(b"\n")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"), whole
            except UnicodeDecodeError as error:
                if whole:
                    raise ValueError(
                        f"{path}, line {number}: not UTF-8 ({error}); logs are, so another program wrote here: remove "
                        "the line, or the file"
                    ) from error


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location (`file, line n`) and the object of each line of a JSONL file; skips blank lines.

    Raises:
        ValueError: a line is no JSON object and not the incomplete last line of a killed run.
    """
    for number, line, whole in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if not whole:
                return
            raise ValueError(
                f"{where}: broken JSON ({error}), found {line[:60]!r}; remove the line to go on without it"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{where}: found a JSON {type(row).__name__}, but each line holds one object: "
                "remove the line, or the file if it is of another program"
            )
        yield where, row
