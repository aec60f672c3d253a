"""Environment on a server of OpenEnv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_rlhf.environments.environment import Answer, Done, Environment, Reply, ToolCall
from lightning_rlhf.types import Row

LONGEST = 86400.0
"""Most seconds that the client waits for a message: `Episodes.seconds` is the limit."""


class OpenEnvironment(Environment):
    """Environment that a running server of OpenEnv plays, in one session for each episode.

    The server gets the episode's `seed` at `reset` if its environment takes one, and `step` with each turn. Its rewards
    are those of the turns, None is 0. It must allow as many sessions at once as a rollout has episodes
    (`create_fastapi_app(..., max_concurrent_envs=...)`). No code of the server's runs here.

    Args:
        url: of the server, `http://` or `ws://`.
        action: field of the action that is the text of a turn; or a function from the text to all fields.
        observation: field of the observation that the policy reads; or a function from its fields to the text.
        columns: of the row, given to the server's `reset` by name; they must be JSON.
    """

    def __init__(
        self,
        url: str,
        action: str | Callable[[str], dict[str, Any]] = "message",
        observation: str | Callable[[Mapping[str, Any]], str] = "message",
        columns: Sequence[str] = (),
    ) -> None:
        self.url, self.action, self.observation, self.columns = url, action, observation, tuple(columns)
        self._client: Any = None

    async def reset(self, row: Row) -> str | None:  # type: ignore[override]
        """Open the session and return the first observation, None if it is empty.

        Raises:
            ImportError: `openenv-core` is not installed.
            ConnectionError: there is no server, or it has no session left.
            RuntimeError: the server failed, or has no session left.
            ValueError: the row lacks a column, or the observation has no such field of text.
        """
        if missing := [name for name in self.columns if name not in row]:
            raise ValueError(f"a row has no column {', '.join(missing)}, only {sorted(row)}: see `columns`")
        self._client = _client(self.url)
        result = await self._begun({name: row[name] for name in self.columns})
        return self._text(result.observation) or None

    async def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:  # type: ignore[override]
        """Send a turn and return the observation with its reward, or the end.

        Raises:
            RuntimeError: the server failed, or refused the action.
            ValueError: the observation has no such field of text.
        """
        action = {self.action: text} if isinstance(self.action, str) else self.action(text)
        result = await self._client.step(action)
        reward = 0.0 if result.reward is None else float(result.reward)
        return Done(reward) if result.done else Reply(self._text(result.observation), reward)

    async def close(self) -> None:  # type: ignore[override]
        """End the session."""
        if self._client is not None:
            await self._client.close()

    async def _begun(self, columns: dict[str, Any]) -> Any:
        """Return what the server's `reset` gives."""
        from websockets.exceptions import ConnectionClosed

        try:
            return await self._client.reset(seed=self.seed, **columns)
        except ConnectionClosed as error:  # it says why only to a client that reads before it writes
            raise ConnectionError(
                f"{self.url} closed the session as it began: it may have none left, so raise its `max_concurrent_envs` "
                "to the episodes of a rollout"
            ) from error

    def _text(self, observation: Mapping[str, Any]) -> str:
        if not isinstance(self.observation, str):
            return self.observation(observation)
        text = observation.get(self.observation)
        if not isinstance(text, str):
            kinds = {name: type(value).__name__ for name, value in observation.items()}
            raise ValueError(
                f"an observation has no text {self.observation!r}, only {kinds}: set `observation` to a field or a "
                "function"
            )
        return text


def _client(url: str) -> Any:
    """Return a client of the server, which connects at its first message."""
    try:
        from openenv.core.generic_client import GenericEnvClient
    except ImportError as error:
        raise ImportError(
            "OpenEnvironment needs openenv-core: pip install 'lightning-rlhf[openenv]', or openenv-core alone"
        ) from error
    return GenericEnvClient(url, message_timeout_s=LONGEST)
