"""Distinction of local folders from hub names: only a hub name may use the network."""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def local_folder(path: str) -> Path | None:
    """Return the folder of that name; returns None if `path` is a hub name.

    NAME and OWNER/NAME, of letters, digits, `-`, `_` and `.`, are hub names unless there is such a folder, or OWNER is
    a folder here. Everything else is a path and never leaves this machine.

    Raises:
        ValueError: `path` is a path and there is no such folder, or it is a file.
    """
    path = expanduser(path)
    folder = Path(path)
    if path and folder.is_dir():
        return folder
    if folder.is_file():
        raise ValueError(f"`path`: {path} is a file; give the folder it lies in")
    if not _HUB_NAME.fullmatch(path) or (len(folder.parts) > 1 and folder.parent.is_dir()):
        raise ValueError(
            f"`path`: there is no folder {path or repr(path)}; give a model folder, or a hub name (NAME or OWNER/NAME)"
        )
    return None
