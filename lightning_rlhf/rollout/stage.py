"""Runner of the calls of environments, which answer while others are decoded."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Self


class Stage:
    """Runner of calls, each in a thread of its own; what they await runs in one event loop.

    It is a context: its loop ends once the calls are over that began before its end. A call that hangs is left behind
    in a thread that does not keep the process alive.

    Args:
        seconds: most wall time of a call.
    """

    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun: list[Future[Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop, begun = self._loop, self._begun

        def end() -> None:
            wait(begun, timeout=self.seconds)
            if loop is not None:
                loop.call_soon_threadsafe(loop.stop)

        threading.Thread(target=end, daemon=True).start()

    def start(self, call: Callable[[], Any]) -> Call:
        """Begin a call; what it returns is awaited if it can be."""
        future: Future[Any] = Future()
        self._begun.append(future)
        loop = self._running()

        def work() -> None:
            try:
                result = call()
                if inspect.isawaitable(result):
                    result = asyncio.run_coroutine_threadsafe(_awaited(result), loop).result()
            except BaseException as error:
                with suppress(InvalidStateError):  # given up meanwhile
                    future.set_exception(error)
                return
            with suppress(InvalidStateError):
                future.set_result(result)

        threading.Thread(target=work, daemon=True).start()
        return Call(future, deadline=monotonic() + self.seconds)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


async def _awaited(result: Any) -> Any:
    return await result


class Call:
    """Call that has begun.

    Args:
        future: of its result.
        deadline: when it is given up, on the monotonic clock, s.
    """

    def __init__(self, future: Future[Any], *, deadline: float) -> None:
        self.future, self.deadline = future, deadline

    @property
    def is_over(self) -> bool:
        """True if there is a result, or there will be none in time."""
        return self.future.done() or monotonic() >= self.deadline

    def result(self) -> Any:
        """Return the result of a call that is over.

        Raises:
            TimeoutError: it did not end in time.
            Exception: what it raised.
        """
        if not self.future.done():
            self.future.cancel()
            raise TimeoutError("it did not answer in time")
        return self.future.result()


def wait_for_some(calls: Sequence[Call], *, patience: float) -> None:
    """Wait until all calls are over, or until one is once `patience` has run out.

    Args:
        calls: at least one.
        patience: s.
    """
    given_up = monotonic() + patience
    while waiting := [call for call in calls if not call.is_over]:
        late = monotonic() >= given_up
        if late and len(waiting) < len(calls):
            return
        until = min(call.deadline for call in waiting)
        rest = max(min(until, until if late else given_up) - monotonic(), 0.0)
        wait([call.future for call in waiting], timeout=rest, return_when=FIRST_COMPLETED if late else ALL_COMPLETED)
