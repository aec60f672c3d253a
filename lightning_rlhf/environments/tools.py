"""Environment whose answers are the results of the functions that the policy calls."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from lightning_rlhf.environments.environment import Answer, Done, Environment, Message, ToolCall


class ToolEnvironment(Environment):
    """Environment of tools: it runs the calls in a turn, and a turn without a call is the last.

    A tool is a function with type hints and a docstring in Google's style, from which `transformers` derives its JSON
    schema for the chat template; it may be `async def`. What it returns is written as text, anything but text as JSON.
    A bad call, an unknown name and an exception are answered with a message to the policy that starts with `error:`.
    The environment gives no reward: that of the module scores the last turn.

    Args:
        tools: functions.
        described: whether the chat template lists the tools in the prompt; with a template that cannot, describe them
            in the prompts.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], described: bool = True) -> None:
        self.tools = {tool.__name__: tool for tool in tools}
        self.described = described

    def schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools; none if the template is not to list them."""
        return [get_json_schema(tool) for tool in self.tools.values()] if self.described else []

    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Answer each call with a message of the role `tool`."""
        if not tool_calls:
            return Done()
        return [self._result(call) for call in tool_calls]

    def _result(self, call: ToolCall) -> Message:
        name = {"name": call.name} if call.name else {}
        return {"role": "tool", **name, "content": self._content(call)}

    def _content(self, call: ToolCall) -> str:
        """Return what a call gives as text, or why it gives nothing."""
        if call.problem:
            return f"error: {call.problem}"
        tool = self.tools.get(call.name)
        if tool is None:
            return f"error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
        try:
            inspect.signature(tool).bind(**call.arguments)
            result = settled(tool(**call.arguments))
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        except Exception as error:  # a tool is the user's: whatever it raises is told to the policy
            return f"error: {type(error).__name__}: {error}"


def settled(result: Any) -> Any:
    """Return what a function of the user's gave, awaited if it can be."""
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result
