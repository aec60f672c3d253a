"""Calls that run at the same time, in threads or in an event loop of their own."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

CLOSING = 5.0
"""Most seconds that an interrupted caller waits for the event loop to end."""
Result = tuple[Any, BaseException | None]


def is_async(fn: Callable[..., Any]) -> bool:
    """Return True for an `async def` function, a partial of one or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def each_in_threads(call: Callable[[int], Any], prompts: Sequence[Any], *, most: int, source: str) -> list[Any]:
    """Return `call(i)` for every row i in order, called in threads.

    After a failure or an interrupt no further call begins; those that run are left to end by themselves.

    Args:
        call: takes the index of a row.
        prompts: of the rows, for the error.
        most: number of calls at a time.
        source: whose calls they are, for the error.

    Raises:
        RuntimeError: a call failed.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for i in range(len(prompts)):
        waiting.put(i)
    done: SimpleQueue[tuple[int, Result]] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        with suppress(Empty):
            while not stopped.is_set():
                i = waiting.get_nowait()
                outcome = _outcome(partial(call, i))
                if outcome[1] is not None:
                    stopped.set()
                done.put((i, outcome))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(prompts)))]
    results = [None] * len(prompts)
    try:
        for thread in threads:
            thread.start()
        for _ in prompts:
            i, (results[i], problem) = done.get()
            if problem is not None:
                raise failure(i, prompts, problem, source=source) from problem
    finally:
        stopped.set()
    for thread in threads:
        thread.join()
    return results


def each_in_loop(call: Callable[[int], Awaitable[Any]], prompts: Sequence[Any], *, most: int, source: str) -> list[Any]:
    """Return the results of `await call(i)` for every row i in order, in one event loop.

    A failure cancels the others. Arguments and errors are those of `each_in_threads`.
    """
    return in_loop(lambda: each_awaited(call, prompts, most=most, source=source))


async def each_awaited(
    call: Callable[[int], Awaitable[Any]], prompts: Sequence[Any], *, most: int, source: str
) -> list[Any]:
    """Await `call(i)` for every row as `each_in_loop` does, in the running loop."""
    slots = asyncio.Semaphore(most)

    async def one(i: int) -> Any:
        async with slots:
            try:
                return await call(i)
            except Exception as error:
                raise failure(i, prompts, error, source=source) from error

    tasks = [asyncio.ensure_future(one(i)) for i in range(len(prompts))]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def in_loop(start: Callable[[], Awaitable[Any]]) -> Any:
    """Return what an awaitable gives, run by a new event loop in a thread of its own.

    It works below a loop that runs already, as in a notebook, and in every thread. The loop is closed afterwards; an
    interrupt of the caller cancels its tasks.

    Args:
        start: makes the awaitable, called in the loop.
    """
    loop = asyncio.new_event_loop()
    done: SimpleQueue[Result] = SimpleQueue()

    async def main() -> Any:
        return await start()

    def run() -> Any:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(main())

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    thread = threading.Thread(target=lambda: done.put(_outcome(run)), daemon=True)
    thread.start()
    try:
        result, problem = done.get()
    except BaseException:  # an alarm, Ctrl-C
        with suppress(RuntimeError):  # the loop has just ended
            loop.call_soon_threadsafe(cancel)
        raise
    finally:
        thread.join(CLOSING)
    if problem is not None:
        raise problem
    return result


def failure(index: int, prompts: Sequence[Any], problem: BaseException, *, source: str) -> RuntimeError:
    """Return the error of one row's call, which names the row."""
    return RuntimeError(
        f"{source} failed for response {index}, whose prompt begins {str(prompts[index])[:80]!r}, with "
        f"{type(problem).__name__}: {problem}"
    )


def _outcome(call: Callable[[], Any]) -> Result:
    """Return the result of a call or what it raised."""
    try:
        return call(), None
    except BaseException as error:
        return None, error
