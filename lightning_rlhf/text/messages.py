"""Dialogues as lists of `{"role", "content"}`."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
Prompt = str | list[Message]
"""Prompt of a response: a text, or a dialogue that waits for the assistant."""


def as_dialogue(prompt: Prompt, role: str = "user") -> list[Message]:
    """Convert a prompt to messages: a dialogue stays, a text becomes one message of `role`."""
    return [{"role": role, "content": prompt}] if isinstance(prompt, str) else prompt


def extras(message: Message) -> list[str]:
    """List the keys beyond role and content that hold something."""
    return [key for key, value in message.items() if key not in ("role", "content") and value not in (None, "", [], {})]


def checked_messages(value: Any, key: str) -> list[Message]:
    """Return `value` if it is a dialogue and raise otherwise.

    Args:
        value: what the record holds.
        key: the key it came from, for the error.

    Returns:
        messages, at least one, each with a text `role` and a text `content`, which is empty where there are only tool
        calls.

    Raises:
        ValueError: it is none.
    """
    needed = 'a text or a list of messages {"role": ..., "content": ...}'
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be {needed}, found {type(value).__name__}: {str(value)[:80]}")
    if not value:
        raise ValueError(f"`{key}` must be {needed}, found an empty list")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"`{key}`[{number}] must be a message with role and content, found {str(message)[:80]!r}")
        if message.get("content") is None and message.get("tool_calls"):
            message = {**message, "content": ""}
        for part in ("role", "content"):
            if not isinstance(message.get(part), str):
                raise ValueError(
                    f"`{key}`[{number}] needs a text under {part!r}, found {message.get(part)!r} "
                    f"(keys: {sorted(message)})"
                )
        if not message["role"].strip():
            raise ValueError(f"`{key}`[{number}] has an empty role: name who speaks, such as 'user' or 'assistant'")
        messages.append(message)
    return messages


def checked_prompt(value: Any, key: str) -> Prompt:
    """Return `value` if it is a text or a dialogue that waits for an answer.

    Raises:
        ValueError: it is neither, or the assistant spoke last.
    """
    if isinstance(value, str):
        return value
    messages = checked_messages(value, key)
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"`{key}` ends with an assistant message, so there is nothing to answer: end it with the user's turn"
        )
    return messages


def checked_answer(value: Any, key: str) -> str | list[Message]:
    """Return `value` if it is a text or messages that end with the assistant's.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        return value
    messages = checked_messages(value, key)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"`{key}` must end with a message of role 'assistant', found role {messages[-1]['role']!r}")
    return messages
