"""Episodes on a server of OpenEnv on the loopback."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.environments import Done, OpenEnvironment, Reply
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.rollout.episode_sampler import EpisodeError

ENDS = [0, 1, 2, 4]
SESSIONS = 6


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openenv", None)
    monkeypatch.setitem(sys.modules, "openenv.core.generic_client", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-rlhf\[openenv\]'"):
        asyncio.run(OpenEnvironment("http://127.0.0.1:1").reset({}))


@pytest.fixture(scope="module")
def game() -> Iterator[Any]:
    """A server of a game of three turns; its class keeps what it heard and how many sessions are open."""
    pytest.importorskip("openenv.core")
    uvicorn = pytest.importorskip("uvicorn")
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Said(Action):
        message: str

    class Heard(Observation):
        message: str = ""
        left: int = 0

    class Game(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        heard: list[list[str]] = []
        seeds: list[int] = []
        opened = 0
        closed = 0
        url = ""

        def __init__(self) -> None:
            super().__init__()
            self.turns, self.opening = [], ""
            Game.opened += 1

        def reset(self, seed=None, episode_id=None, opening="", **others) -> Heard:
            assert not others
            Game.seeds.append(seed)
            Game.heard.append(self.turns)
            self.opening = opening
            return Heard(message=opening, left=3)

        def step(self, action, timeout_s=None, **others) -> Heard:
            self.turns.append(action.message)
            if action.message == "fail":
                raise RuntimeError("no such door")
            left = 3 - len(self.turns)
            return Heard(message="x y", left=left, done=left == 0, reward=10 if left == 0 else None if left == 1 else 1)

        def close(self) -> None:
            Game.closed += 1

        @property
        def state(self) -> State:
            return State()

    app = create_fastapi_app(Game, Said, Heard, max_concurrent_envs=SESSIONS)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    Game.opened = Game.closed = 0
    Game.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    yield Game
    server.should_exit = True
    thread.join(timeout=10)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(environment: OpenEnvironment, texts: list[str], row: Any = None) -> list[Any]:
    """What it opens with and answers to texts."""

    async def asked() -> list[Any]:
        try:
            return [await environment.reset(row or {}), *[await environment.step(text, []) for text in texts]]
        finally:
            await environment.close()

    return asyncio.run(asked())


def test_rewards_and_the_end_are_the_server_s(game):
    assert answers(OpenEnvironment(game.url), ["a", "b", "c"]) == [
        None,
        Reply("x y", 1.0),
        Reply("x y", 0.0),
        Done(10.0),
    ]
    assert game.heard[-1] == ["a", "b", "c"]


def test_row_and_seed_reach_the_server(game):
    environment = OpenEnvironment(game.url, columns=["opening"])
    environment.seed = 7
    assert answers(environment, [], {"opening": "z", "prompt": "a"}) == ["z"]
    assert game.seeds[-1] == 7
    with pytest.raises(ValueError, match=r"a row has no column opening, only \['prompt'\]"):
        answers(environment, [], {"prompt": "a"})


def test_action_and_observation_by_function(game):
    environment = OpenEnvironment(
        game.url, action=lambda text: {"message": text.upper()}, observation=lambda fields: f"{fields['left']} left"
    )
    assert answers(environment, ["a"]) == ["3 left", Reply("2 left", 1.0)]
    assert game.heard[-1] == ["A"]


def test_what_is_refused(game):
    with pytest.raises(ValueError, match="no text 'left', only {'message': 'str', 'left': 'int'}: set `observation`"):
        answers(OpenEnvironment(game.url, observation="left"), ["a"])
    with pytest.raises(RuntimeError, match="Server error"):
        answers(OpenEnvironment(game.url, action="word"), ["a"])
    with pytest.raises(RuntimeError, match="no such door"):
        answers(OpenEnvironment(game.url), ["fail"])
    with pytest.raises(ConnectionError):
        answers(OpenEnvironment("http://127.0.0.1:1"), ["a"])


@pytest.fixture
def play(game, make_lm, toy_tokenizer, left_padded):
    def played(samples: int) -> Any:
        until(lambda: game.opened == game.closed)
        game.heard.clear()
        module = PPOModule(
            make_lm("llama", end=ENDS).eval(),
            EnvironmentReward(),
            tokenizer=toy_tokenizer,
            generation=SamplingParams(max_new_tokens=6, samples_per_prompt=samples),
            environment=Episodes(factory=lambda: OpenEnvironment(game.url), tokens=40, patience=30.0, seconds=30.0),
        )
        module.configure_model()
        return module, module.responder.collect(left_padded([[12, 13, 14], [10]]), samples=samples, iteration=3)

    return played


def test_policy_plays_a_session_for_each_episode(game, play):
    before = game.opened
    module, rollout = play(SESSIONS // 2)
    assert game.opened - before == SESSIONS
    assert not rollout.failed.any()
    assert int(rollout.spans.max()) == 3
    ids, own = rollout.tokens[:, rollout.prompt_width :], rollout.response_mask
    real = torch.arange(ids.shape[1]) < rollout.extents[:, None]
    foreign = [row[mask].tolist() for row, mask in zip(ids, real & ~own, strict=True)]
    written = module.tokenizer.convert_tokens_to_ids(["x", "y"])
    assert foreign == [written * (int(spans) - 1) for spans in rollout.spans]
    expected = [{1: 0.0, 2: 1.0, 3: 1.0}[int(spans)] for spans in rollout.spans]
    expected = [11.0 if ended else given for ended, given in zip(rollout.ended, expected, strict=True)]
    assert rollout.rewards.sum(1).tolist() == expected
    assert 11.0 in expected
    turns = int(rollout.spans.sum())
    assert turns - SESSIONS <= sum(map(len, game.heard)) <= turns
    until(lambda: game.closed == game.opened)


def test_server_without_sessions_left_is_reported(play):
    with pytest.raises(EpisodeError, match="max_concurrent_envs|CAPACITY"):
        play(SESSIONS)
