"""Writing a folder whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name and place when the block ends without an error.

    Raises:
        ValueError: `folder` is a file.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        raise ValueError(f"can't write a folder to {folder}: a file has that name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        target = work / "new"
        target.mkdir()
        yield target
        for file in filter(Path.is_file, target.rglob("*")):  # safetensors lets nobody else read what it writes
            file.chmod(target.stat().st_mode & 0o666)
        if folder.exists():
            folder.rename(work / "old")
        try:
            target.rename(folder)
        except OSError:
            if (work / "old").exists():
                (work / "old").rename(folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
