"""Defer SIGINT and SIGTERM to the end of the current batch."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch.utilities.exceptions import SIGTERMException

logger = logging.getLogger(__name__)

POLITE = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Records the first SIGINT or SIGTERM; a second one ends the run at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Install the handlers, which only the main thread can."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in POLITE}

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before, self.received = {}, None

    def leave(self) -> NoReturn:
        """End the run with the signal's exit status in a shell, if Lightning allows it.

        Raises:
            KeyboardInterrupt: after Ctrl-C; Lightning ends with status 1.
            SIGTERMException: after SIGTERM, here or on another process; status 143.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SIGTERMException(128 + signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.leave()
        self.received = number
        logger.warning(
            "%s: the current batch is finished and saved, then the run ends; send it again to leave at once, with the "
            "last checkpoint as it is",
            signal.Signals(number).name,
        )
