"""Messages of failed commands: one sentence for a refused input, a traceback for a bug."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

TRACEBACK = "LIGHTNING_RLHF_TRACEBACK"
"""Environment variable; if it is 1 every failure shows its traceback."""
SPEAKERS = ("lightning_rlhf", "lightning.pytorch", "lightning.fabric", "torch.optim", "jsonargparse")
"""Packages that check settings; a sentence that one of them raises explicitly is meant for the user."""
_CHECKS = ("__init__", "__post_init__")
_KILLED = "DataLoader worker (pid"
"""Beginning of PyTorch's error, raised anywhere in the main thread, after the system killed a data worker."""
READERS = ("lightning_rlhf.folders", "lightning_rlhf.models", "lightning_rlhf.text")
"""Subpackages that read files, whose errors are about these and not about the config that names them."""


def sentence(error: BaseException) -> str | None:
    """Return a refusal on one line; returns None for a bug or if `TRACEBACK` asks for the traceback.

    A refusal stopped at a `raise` of one of `SPEAKERS`, or is the operating system's answer to one of them: a file
    that can't be opened, a full disk; or a data worker was killed. An error out of torch,
    transformers or a user's own reward is a bug.
    """
    error = _origin(error)
    trace = list(_frames(error))
    if type(error).__name__ == "RewardError" and error.__cause__ is not None and sentence(error.__cause__) is None:
        return None  # the user's own code raised it
    if not trace or os.environ.get(TRACEBACK) == "1":
        return None
    if isinstance(error, RuntimeError) and str(error).startswith(_KILLED):
        return (
            f"{one_line(str(error)).rstrip('. ')}, as the system kills one where memory is short; the last checkpoint "
            "is whole: resume with fewer `num_workers`, 0 for none"
        )
    if isinstance(error, OSError) and error.filename is not None and _asked_by_speaker(trace):
        return f"{error.filename}: {error.strerror}"
    frame, line = trace[-1]
    on_purpose = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    stopped = isinstance(error, RuntimeError) and _module(frame).startswith("lightning_rlhf.")  # by a guard
    if (stopped or isinstance(error, _refusals())) and on_purpose and _speaks(frame):
        return one_line(str(error))
    return None


def status(error: BaseException) -> int:
    """Exit status: 2 if the config's own values were refused, 1 if data or models or files were."""
    frames = [frame for part in (error, _origin(error)) for frame, _ in _frames(part)]
    building = any(_module(f) == "lightning.pytorch.cli" and f.f_code.co_name == "instantiate_classes" for f in frames)
    reading = any(_module(f).startswith(READERS) and f.f_code.co_name not in _CHECKS for f in frames)
    return 2 if building and not reading else 1


def one_line(message: str) -> str:
    """Remove line breaks and terminal control characters from a message, which may quote data."""
    from lightning_rlhf.text.escape import terminal

    return terminal(" ".join(message.split()))


def _refusals() -> tuple[type[BaseException], ...]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return (ValueError, TypeError, OSError, ImportError, MisconfigurationException)


def _origin(error: BaseException) -> BaseException:
    """Unwrap the error that jsonargparse wraps when a class of the config refuses its arguments."""
    trace = list(_frames(error))
    if error.__cause__ is None or not trace or not _module(trace[-1][0]).startswith("jsonargparse."):
        return error
    return _origin(error.__cause__)


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Frames from the outermost inwards, each with the number of the line it stopped at."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _asked_by_speaker(trace: list[tuple[FrameType, int]]) -> bool:
    """Return True if the innermost frame outside the standard library is of `SPEAKERS`."""
    outside = [f for f, _ in trace if _module(f).partition(".")[0] not in sys.stdlib_module_names]
    return bool(outside) and _speaks(outside[-1])


def _speaks(frame: FrameType) -> bool:
    return any(f"{_module(frame)}.".startswith(f"{package}.") for package in SPEAKERS)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
