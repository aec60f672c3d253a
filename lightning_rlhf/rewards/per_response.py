"""Reward by a function of one response, called for many at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_rlhf.core.checks import check_count
from lightning_rlhf.rewards.concurrent import each_in_loop, each_in_threads, is_async
from lightning_rlhf.rewards.reward import FunctionReward


class PerResponse(FunctionReward):
    """Reward by a function `fn(prompt, response, **columns)` of one response, several calls at a time.

    For functions that wait: for a server, a program, a file. A plain function is called in threads, an `async def`
    function in an event loop that is new for each rollout, so that what it opens in one loop is not left for the next.
    Scores keep the responses' order. A call that fails is named with its row, and no further one begins.

    Args:
        fn: returns a number, or None where the response is not its task. It gets the cells of the columns it names, or
            of all if it takes `**kwargs`; a column called `response` is left out.
        concurrency: most calls at a time.

    Raises:
        TypeError: `fn` has no signature.
        ValueError: `concurrency` is not positive.
    """

    def __init__(self, fn: Callable[..., Any], concurrency: int = 16) -> None:
        super().__init__(fn)
        check_count(concurrency=concurrency)
        self.concurrency = concurrency

    def identity(self) -> dict[str, Any]:
        """Describe what decides the scores."""
        return {"fn": self.fn}

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> list[Any]:
        """Return the result of the function for each response.

        Raises:
            RuntimeError: a call failed.
        """
        named = {name: cells for name, cells in columns.items() if name in self._wanted and name != "response"}

        def call(i: int) -> Any:
            return self.fn(prompts[i], responses[i], **{name: cells[i] for name, cells in named.items()})

        run = each_in_loop if is_async(self.fn) else each_in_threads
        return run(call, prompts, most=self.concurrency, source=f"the reward {self._name()}")
