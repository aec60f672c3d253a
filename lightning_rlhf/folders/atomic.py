"""Atomic writes of folders, which replace only folders that were written so."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "lightning_rlhf.json"
"""List of the folder's files, which marks a folder as written by this library."""
_WORK = "work.json"
"""File that names the process whose temporary folder it lies in."""


@contextmanager
def write_folder(folder: str | Path) -> Iterator[Path]:
    """Context with a temporary folder that atomically replaces `folder` if the block raises no error.

    An existing folder is there until then. Remains of killed processes beside it are removed.

    Args:
        folder: `~` is the home directory.

    Raises:
        ValueError: `folder` is a file, or holds a file that this function did not write.
        OSError: it cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(folder)
    work = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        (work / _WORK).write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        target = work / "new"
        target.mkdir()
        try:
            yield target
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise OSError(str(error)) from error
        files = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
        (target / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
        for file in filter(Path.is_file, target.rglob("*")):  # safetensors lets nobody else read what it writes
            file.chmod(target.stat().st_mode & 0o666)
        check_replaceable(folder)
        _put(target, folder, aside=work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(folder: str | Path) -> None:
    """Raise unless `folder` is missing or empty or holds only files of `write_folder`.

    Raises:
        ValueError: it is a file, holds other files, or is where the process works.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        raise ValueError(f"can't write a folder to {folder}: a file has that name")
    if not folder.is_dir():
        return
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{folder} is or holds the working directory, and an export replaces it: give a new folder")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    strange = sorted(present - _written(folder))
    if strange:
        names = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise ValueError(
            f"{folder} holds files that were not exported there ({names}), and an export replaces the whole folder: "
            "give a new folder, or move them away"
        )


def check_writable(folder: str | Path) -> None:
    """Raise unless `write_folder` could write there now.

    Raises:
        ValueError: it could not.
    """
    folder = Path(folder).expanduser().absolute()
    check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    except OSError as error:
        raise ValueError(f"can't write to {folder} ({error}): give a folder that can be written to") from error


def _written(folder: Path) -> set[str]:
    """List the files that `write_folder` wrote into the folder."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {MANIFEST, *map(str, files)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _put(target: Path, folder: Path, *, aside: Path) -> None:
    """Move `target` to the path of `folder`, atomically if the system can exchange two folders."""
    if not folder.exists():
        target.rename(folder)
        return
    if _exchange(target, folder):
        return
    folder.rename(aside)
    try:
        target.rename(folder)
    except OSError:
        aside.rename(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names with Linux's renameat2; returns False if it is not available."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _prefix(folder: Path) -> str:
    return f".{folder.name}-"


def _remove_left(folder: Path) -> None:
    """Remove the temporary folders of processes that were killed while they wrote `folder`."""
    for work in folder.parent.iterdir():
        if not work.name.startswith(_prefix(folder)):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            owner = json.loads((work / _WORK).read_text(encoding="utf-8"))
            if owner["host"] == socket.gethostname() and not _is_alive(int(owner["process"])):
                shutil.rmtree(work, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
