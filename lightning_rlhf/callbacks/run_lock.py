"""Lock of a folder against a second run."""

from __future__ import annotations

import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_rlhf.callbacks.writable import on_first

if os.name == "posix":
    import fcntl


class RunLock:
    """Exclusive lock of a file by one process until it is released or the process ends, even if killed.

    Where the system or the file system has no POSIX locks, nothing is locked.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._path: Path | None = None

    def claim(self, trainer: Trainer, path: Path, *, argument: str) -> None:
        """Lock the file on the first process, for all of them.

        Args:
            trainer: whose processes.
            path: of the lock file, in the folder to be locked.
            argument: where the user gave the folder.

        Raises:
            ValueError: another run has locked it, or the folder cannot be written to.
        """

        def problem() -> str | None:
            holder = self.take(path)
            if holder is None:
                return None
            return (
                f"another run writes to {path.parent}: {holder}; wait for it, end it, or give this run another folder"
            )

        on_first(trainer, problem, folder=path.parent, argument=argument)

    def take(self, path: Path) -> str | None:
        """Create a file and its folder, lock it and write its holder into it.

        Returns:
            None if the lock is taken; otherwise its holder: process, computer, start and command.

        Raises:
            OSError: the folder cannot be written to.
        """
        if os.name != "posix":
            return None
        self.release()
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read().strip()
                file.close()
                return holder or "an unknown process"
            except OSError:
                file.close()
                return None
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # the holder removed it in between
        file.truncate(0)
        command = " ".join(sys.argv)[:200]
        started = datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}: {command}\n")
        file.flush()
        self._file, self._path = file, path
        return None

    def release(self) -> None:
        """Remove the file and unlock it."""
        if self._file is None or self._path is None:
            return
        self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None
