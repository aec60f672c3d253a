"""Answers of a chat model on disk, one file each."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


class AnswerStore:
    """Folder of answers by request, for several processes at a time.

    Each file is written whole under another name and renamed, so that a reader sees all of it or none. A file that
    can't be read counts as none.

    Args:
        folder: `~` is the home directory.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def get(self, body: dict[str, Any]) -> str | None:
        """Return the answer to a request; None if it is not known."""
        try:
            kept = json.loads(self._path(body).read_text(encoding="utf-8"))
            return kept["answer"] if kept["request"] == body and isinstance(kept["answer"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, body: dict[str, Any], answer: str) -> None:
        """Keep the answer to a request.

        Raises:
            ValueError: the folder cannot be written to.
        """
        path = self._path(body)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=".part-", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({"request": body, "answer": answer}, file, indent=1)
                os.replace(part, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(part)
                raise
        except OSError as error:
            raise ValueError(f"`cache`: an answer can't be kept in {self.folder} ({error})") from error

    def _path(self, body: dict[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"
