"""Atomic writes and integrity checks for checkpoints."""

from __future__ import annotations

import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path


def settle(path: Path) -> None:
    """Flush a file or all files of a folder to the disk.

    Raises:
        OSError: the disk is full or broken.
    """
    for inner in sorted(path.rglob("*")) if path.is_dir() else []:
        if inner.is_file():
            _sync(inner)
    _sync(path)


def rename(path: Path, name: Path) -> None:
    """Rename `path`, replacing a file or folder that has the name."""
    if name.is_dir() and not name.is_symlink():  # a folder cannot be replaced in one step
        shutil.rmtree(name)
    elif path.is_dir():  # nor a file by a folder
        name.unlink(missing_ok=True)
    os.replace(path, name)
    if os.name == "posix":
        _sync(name.parent)


def discard(path: Path) -> None:
    """Remove a file or folder if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def defect(path: Path) -> str | None:
    """Describe why a checkpoint cannot be read; returns None if it is intact.

    A file that torch wrote is a zip archive with a checksum of every tensor; a sharded checkpoint is a folder, of which
    only the presence of its index is checked.
    """
    if path.is_dir():
        return None if any(path.rglob(".metadata")) or any(path.rglob("latest")) else "it has no index"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        return f"it ends early or is no checkpoint ({error})"
    return None if broken is None else f"the checksum of {broken} is wrong"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
