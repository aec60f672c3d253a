"""A text game of three rooms on OpenEnv's server: say the color of the door that the voice names."""

from __future__ import annotations

import random
import re
import sys
from typing import Any

import uvicorn
from openenv.core import Action, Environment, Observation, State, create_fastapi_app

DOORS = ["red", "blue", "green", "black", "white", "golden"]
ROOMS, SESSIONS = 3, 512


class Said(Action):
    """What the player says."""

    message: str


class Heard(Observation):
    """What the player reads."""

    message: str = ""


class Rooms(Environment):
    """Three rooms of three doors each. The right color opens one, worth 1/3 as the only word and 1/6 among others."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Heard:
        self.random, self.room = random.Random(seed), 0
        return Heard(message=self.look())

    def look(self) -> str:
        doors = self.random.sample(DOORS, 3)
        self.right = self.random.choice(doors)
        return f"You see a {doors[0]}, a {doors[1]} and a {doors[2]} door. A voice says: take the {self.right} one."

    def step(self, action: Said, timeout_s: float | None = None, **_: Any) -> Heard:
        words = re.findall("[a-z]+", action.message.lower())
        if {word for word in words if word in DOORS} != {self.right}:
            return Heard(message="The door is locked. The game is over.", reward=0.0, done=True)
        self.room += 1
        reward = (1.0 if len(words) == 1 else 0.5) / ROOMS
        if self.room == ROOMS:
            return Heard(message="You are out.", reward=reward, done=True)
        return Heard(message=self.look(), reward=reward)

    @property
    def state(self) -> State:
        return State(step_count=self.room)


def app() -> Any:
    """The server's application."""
    return create_fastapi_app(Rooms, Said, Heard, max_concurrent_envs=SESSIONS)


if __name__ == "__main__":
    uvicorn.run(app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="critical")
