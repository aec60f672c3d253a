"""Environment classes as TRL's `environment_factory` takes them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightning_rlhf.environments.environment import Answer, Done, ToolCall
from lightning_rlhf.environments.tools import ToolEnvironment
from lightning_rlhf.types import Row

OWN = ("reset", "get_reward")
"""Methods of such a class that are no tools."""


class TRLEnvironment(ToolEnvironment):
    """Environment of an object with the methods that TRL's GRPOTrainer calls.

    Its public methods are the tools, `reset(**row)` returns a text that follows the prompt or None, and `get_reward()`,
    where it has one, is the reward of the episode.

    Args:
        factory: builds the object, which has `reset`.
        described: as of `ToolEnvironment`.

    Raises:
        TypeError: the object has no `reset`.
    """

    def __init__(self, factory: Callable[[], Any], described: bool = True) -> None:
        self.inner = factory()
        if not callable(getattr(self.inner, "reset", None)):
            raise TypeError(
                f"{type(self.inner).__name__} has no method `reset(**row)`, which an environment of TRL has: add it, "
                "or give its functions to ToolEnvironment"
            )
        methods = [name for name, _ in inspect.getmembers(type(self.inner), predicate=inspect.isfunction)]
        tools = [getattr(self.inner, name) for name in methods if name not in OWN and not name.startswith("_")]
        super().__init__(tools, described)

    def reset(self, row: Row) -> Any:
        """Begin with the columns of the prompt's row by name."""
        return self.inner.reset(**row)

    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Answer the calls; without one, end with the object's reward."""
        answer = super().step(text, tool_calls)
        reward = getattr(self.inner, "get_reward", None)
        if not isinstance(answer, Done) or reward is None:
            return answer
        score = reward()
        return Done(asyncio.run(score) if inspect.iscoroutine(score) else score)
