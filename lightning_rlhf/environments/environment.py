"""What answers the policy during an episode: messages, or the end with a reward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from lightning_rlhf.text.characters import check_characters
from lightning_rlhf.types import Row

Message: TypeAlias = dict[str, Any]


class ToolCall(NamedTuple):
    """Call of a tool in a turn.

    Attributes:
        name: of the tool; empty if there is none.
        arguments: by name.
        problem: why it is malformed; empty if it is not.
    """

    name: str
    arguments: dict[str, Any]
    problem: str = ""


class Reply(NamedTuple):
    """What an environment answers to a turn.

    Attributes:
        messages: a text, which is one message of the user's, or messages.
        reward: of the turn, reward units.
    """

    messages: str | Sequence[Message]
    reward: float = 0.0


class Done(NamedTuple):
    """End of an episode.

    Attributes:
        reward: of its last turn, reward units; what a `Reply` gave before is added.
    """

    reward: float = 0.0


Answer: TypeAlias = "str | Sequence[Message] | Reply | Done"
"""What `step` returns; a text or messages are a `Reply` without reward."""


class Environment(ABC):
    """Environment of one episode: it is built anew for each.

    `reset`, `step` and `close` may be `async def`; then they run in one event loop, and otherwise each call in a thread
    of its own, so that slow ones do not wait for each other.
    """

    seed: int = 0
    """Number of the episode, 0 to 2³¹ − 1, set before `reset`: an environment that takes its random numbers from it
    does the same in a run that is repeated or resumed, on any number of processes."""

    def reset(self, row: Row) -> str | Sequence[Message] | None:
        """Begin the episode.

        Args:
            row: raw record of the prompt.

        Returns:
            what follows the prompt before the policy's first turn: messages, or a text, which is appended to the
                user's message that the prompt ends with; None for nothing.
        """
        return None

    @abstractmethod
    def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:
        """Answer a turn of the policy.

        Args:
            text: of the turn, without special tokens.
            tool_calls: calls in it, in their order, those that are malformed with their `problem`.

        Returns:
            what the policy reads next, or the end of the episode.
        """

    def close(self) -> None:
        """Release what the episode held; called once, also after a failure."""
        return

    def schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools, which the chat template writes into the prompt."""
        return []


def as_reply(answer: Any) -> Reply | Done:
    """Return what `step` gave as a reply or an end.

    Raises:
        TypeError: it is neither a text, messages, a `Reply` nor a `Done`; or the reward is no number.
        ValueError: the reward is not finite, or a text holds half of a surrogate pair.
    """
    reply = answer if isinstance(answer, Done | Reply) else Reply(answer)
    reward = _as_reward(reply.reward)
    return Done(reward) if isinstance(reply, Done) else Reply(as_messages(reply.messages), reward)


def as_opening(given: Any) -> str | list[Message]:
    """Return what `reset` gave as a text, which is empty for None, or as messages.

    Raises:
        TypeError: it is neither.
        ValueError: a text holds half of a surrogate pair, which no tokenizer takes.
    """
    if given is None or isinstance(given, str):
        check_characters(given or "")
        return given or ""
    return as_messages(given)


def as_messages(given: Any) -> list[Message]:
    """Return a text as one message of the user's, and messages as they are.

    Raises:
        TypeError: it is neither.
        ValueError: a text holds half of a surrogate pair, which no tokenizer takes.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    messages = list(given) if isinstance(given, list | tuple) else None
    if not messages or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise TypeError(
            'an environment must answer with a text, messages [{"role": ..., "content": ...}], a Reply or a Done: got '
            f"{type(given).__name__}: {str(given)[:80]}"
        )
    for message in messages:
        check_characters(message["content"])
    return messages


def _as_reward(given: Any) -> float:
    try:
        reward = float(given)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"an environment must give a number as the reward: got {given!r}; for none leave it out, Done()"
        ) from error
    if not math.isfinite(reward):
        raise ValueError(f"an environment must give a finite reward: got {reward}")
    return reward
