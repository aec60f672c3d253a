"""Environment on an OpenEnv server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_rlhf.environments.environment import Answer, Done, Environment, Reply, ToolCall
from lightning_rlhf.types import Row


class OpenEnvironment(Environment):
    """Environment of a running OpenEnv server, with a session of its own for each episode.

    A turn is sent as an action `{action: text}`, and a text field of the observation is what the policy reads; an
    observation without it is read as JSON. Rewards are those of the steps. The server must take as many sessions as
    episodes are played at once (`create_fastapi_app(..., max_concurrent_envs=N)`).

    Args:
        url: of the server, `http://` or `ws://`.
        action: field of an action that takes the turn's text.
        observation: field of an observation that holds a text.
        columns: columns of the row that are given to the server's `reset`, beside `seed`.

    Raises:
        ImportError: `openenv-core` is not installed.
    """

    def __init__(
        self, url: str, action: str = "message", observation: str = "message", columns: Sequence[str] = ()
    ) -> None:
        try:
            from openenv.core.generic_client import GenericEnvClient
        except ImportError as error:
            message = "OpenEnvironment needs OpenEnv: pip install 'lightning-rlhf[openenv]', or openenv-core alone"
            raise ImportError(message) from error
        self.client: Any = GenericEnvClient(base_url=url, mode="simulation")
        self.action, self.observation, self.columns = action, observation, tuple(columns)

    async def reset(self, row: Row) -> str | None:  # type: ignore[override]
        """Begin a session with the episode's seed, and return the text of the first observation."""
        given = {name: row[name] for name in self.columns if name in row}
        result = await self.client.reset(seed=self.seed, **given)
        return self._text(result.observation) or None

    async def step(self, text: str, tool_calls: Sequence[ToolCall]) -> Answer:  # type: ignore[override]
        """Send a turn, and return the observation or the end."""
        result = await self.client.step({self.action: text})
        reward = float(result.reward or 0.0)
        return Done(reward) if result.done else Reply(self._text(result.observation), reward)

    async def close(self) -> None:  # type: ignore[override]
        """End the session."""
        await self.client.disconnect()

    def _text(self, observation: Any) -> str:
        text = observation.get(self.observation) if isinstance(observation, dict) else observation
        return text if isinstance(text, str) else json.dumps(observation, ensure_ascii=False)
