"""Environment that takes the classes of TRL's `environment_factory` as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightning_rlhf.environments.environment import Answer, Done, Message, ToolCall
from lightning_rlhf.environments.tools import ToolEnvironment, settled
from lightning_rlhf.types import Row

_NO_TOOLS = ("reset", "get_reward")


class TRLEnvironment(ToolEnvironment):
    """Environment whose tools are the public methods of an object that was written for TRL's `GRPOTrainer`.

    All methods but `reset`, `get_reward` and those that begin with `_` are tools, those it inherits too. `reset` gets
    the columns of the row by name; the user's message that the prompt ends with goes on with the text that it returns.
    The reward of the last turn is that of `get_reward`, where there is one, plus that of `reward`;
    unlike in TRL an episode that reaches a limit has none. TRL need not be installed.

    Args:
        factory: builds the object, one for each episode: the class, or a function.
        reward: function of the object, which may be `async def`, in reward units; None adds nothing.
        described: as of `ToolEnvironment`.

    Raises:
        TypeError: the object has no method `reset`.
    """

    def __init__(
        self, factory: type | Callable[[], Any], reward: Callable[[Any], Any] | None = None, described: bool = True
    ) -> None:
        self.environment, self.reward = factory(), reward
        kind = type(self.environment)
        names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction)]  # no property is evaluated
        if "reset" not in names:
            raise TypeError(f"an environment of TRL needs a method `reset(**columns)`: {kind.__name__} has none")
        tools = [name for name in names if name not in _NO_TOOLS and not name.startswith("_")]
        super().__init__([getattr(self.environment, name) for name in tools], described)
        self._own_reward = self.environment.get_reward if "get_reward" in names else None

    def reset(self, row: Row) -> str | Sequence[Message] | None:
        """Reset the object by the columns of a row and return what it opens with."""
        return settled(self.environment.reset(**row))

    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Run the calls of a turn; one without a call is the last and has the reward."""
        if tool_calls:
            return super().step(text, tool_calls)
        own = 0.0 if self._own_reward is None else settled(self._own_reward())
        return Done(float(own) + (0.0 if self.reward is None else float(settled(self.reward(self.environment)))))
