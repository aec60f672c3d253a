"""Strict parser of one JSONL line; ambiguous or irreversible JSON is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

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
        _check_surrogates(row)
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


def _check_surrogates(row: dict[str, Any]) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"a text holds half of a surrogate pair, {error.object[error.start]!r}: it was cut inside a character; "
            "remove it"
        ) from error
