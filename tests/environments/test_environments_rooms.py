"""The rooms of examples/openenv, and what an environment opens with."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.environments import (
    Done,
    OpenEnvironment,
)
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.text import Continuation, Encoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "openenv"


@pytest.mark.parametrize(
    ("prompt", "observed", "expected"),
    [
        ([{"role": "user", "content": "a"}], " b", [{"role": "user", "content": "a b"}]),
        ("a", " b", [{"role": "user", "content": "a b"}]),
        (
            [{"role": "system", "content": "a"}],
            "b",
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        ),
        ([{"role": "user", "content": "a"}], "", [{"role": "user", "content": "a"}]),
        ("a", [{"role": "tool", "content": "b"}], [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]),
    ],
)
def test_text_of_reset_goes_on_with_the_user_s_message(toy_tokenizer, prompt, observed, expected):
    continuation = Continuation(Encoder(toy_tokenizer, prompt_role="user"))
    assert continuation.opened(prompt, observed) == expected
    whole = toy_tokenizer.apply_chat_template(expected, add_generation_prompt=True)["input_ids"]
    assert list(continuation.opening(prompt, observed, {})) == whole


@pytest.fixture(scope="module")
def rooms() -> str:
    """Address of a server of the example's game."""
    pytest.importorskip("openenv")
    import uvicorn

    sys.path.insert(0, str(EXAMPLE))
    from rooms import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app(), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)


class Listener(OpenEnvironment):
    """Says what the voice says, instead of the policy."""

    async def step(self, text, tool_calls):
        right = self.heard.rsplit(" ", 2)[1]
        answer = await super().step(f"{right}.", tool_calls)
        if not isinstance(answer, Done):
            self.heard = answer.messages
        return answer

    async def reset(self, row):
        self.heard = await super().reset(row)
        return " " + self.heard


@pytest.mark.parametrize(("player", "rewards"), [(OpenEnvironment, {0.0}), (Listener, {1.0})])
def test_episodes_of_an_openenv_server(rooms, make_lm, toy_tokenizer, left_padded, player, rewards):
    """Sessions beside each other, each by the seed of its episode: a random network is locked in, a listener is out."""
    module = PPOModule(
        make_lm("llama", end=list(range(36))).eval(),
        EnvironmentReward(),
        tokenizer=toy_tokenizer,
        generation=SamplingParams(max_new_tokens=3, samples_per_prompt=4),
        environment=Episodes(factory=lambda: player(rooms), tokens=120, patience=10.0),
    )
    module.configure_model()
    batch = left_padded([[12], [10]], rows=[{"prompt": "c"}, {"prompt": "a"}])
    rollout = module.responder.draw(batch, samples=4, iteration=0, batch=0)
    assert not rollout.failed.any()
    assert rollout.ended.all()
    assert {round(float(total), 6) for total in EnvironmentReward()(rollout, [])} == rewards
    assert int(rollout.spans.max()) == (3 if player is Listener else 1)
    again = module.responder.draw(batch, samples=4, iteration=0, batch=0)
    assert torch.equal(again.tokens, rollout.tokens)
