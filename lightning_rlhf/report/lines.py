"""Lines of a log of which the last may be torn; any other that is broken is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def text_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Number from 1, text, and whether the line is whole: a file's last one may lack its line break.

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
    """Each object of a JSONL file, after the place it stood at (`file, line n`); blank lines are skipped.

    Raises:
        ValueError: a line that is no JSON object and not the torn end of a run that was killed.
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
