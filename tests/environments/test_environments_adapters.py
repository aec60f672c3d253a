"""Environments of other libraries: TRL's classes, OpenEnv's servers and Reasoning Gym's tasks."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.data.reasoning_gym import ReasoningGymRows, read_reasoning_gym
from lightning_rlhf.environments import (
    Done,
    OpenEnvironment,
    ReasoningGymEnvironment,
    ToolCall,
    TRLEnvironment,
)
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.text import Continuation, Encoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "openenv"


class Counter:
    """As TRL's documentation has them: state, tools, and a reward of its own."""

    def reset(self, target: int, **columns) -> str:
        self.target, self.value = target, 0
        return f" Count to {target}."

    def increment(self, step: int) -> int:
        """Raise the counter.

        Args:
            step: by how much.
        """
        self.value += step
        return self.value

    def _hidden(self) -> None: ...

    def get_reward(self) -> float:
        return float(self.value == self.target)


class Bare:
    """Without a reward."""

    def reset(self, **columns) -> None: ...


class Late(Counter):
    async def get_reward(self) -> float:
        return 0.5


def test_methods_of_a_trl_class_are_tools():
    environment = TRLEnvironment(Counter)
    assert [schema["function"]["name"] for schema in environment.schemas()] == ["increment"]
    assert environment.reset({"target": 3, "prompt": "p"}) == " Count to 3."
    calls = [ToolCall("increment", {"step": 2}), ToolCall("increment", {"step": 1})]
    assert [message["content"] for message in environment.step("", calls)] == ["2", "3"]
    assert environment.step("it is 3", []) == Done(1.0)
    (message,) = environment.step("", [ToolCall("get_reward", {})])
    assert "there is no tool 'get_reward'" in message["content"]


def test_reward_of_a_trl_class_may_be_late_or_missing():
    environment = TRLEnvironment(Late, described=False)
    environment.reset({"target": 3})
    assert environment.schemas() == []
    assert environment.step("", []) == Done(0.5)
    assert TRLEnvironment(Bare).step("", []) == Done(0.0)
    with pytest.raises(TypeError, match="dict has no method `reset"):
        TRLEnvironment(dict)


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


def test_wrong_answer_to_a_task_may_be_corrected():
    pytest.importorskip("reasoning_gym")
    row = next(iter(read_reasoning_gym(ReasoningGymRows(task="chain_sum", size=3)))).row
    environment = ReasoningGymEnvironment(attempts=3, extract="last_number")
    environment.reset(row)
    assert environment.step("it is 0.123", []) == "That is not right. Try again."
    assert environment.step("I do not know", []) == "That is not right. Try again."
    end = environment.step(f"it is {row['answer']}", [])
    assert end == Done(1.0)
    environment.reset(row)
    assert [environment.step("0.123", []) for _ in range(3)][2].reward < 1
    assert ReasoningGymEnvironment().reward is ReasoningGymEnvironment().reward  # one process grades for all
    with pytest.raises(ValueError, match="no column `reasoning_gym`: train on ReasoningGymRows"):
        environment.reset({"prompt": "p"})
    with pytest.raises(ValueError, match="`attempts` must be at least 1: got 0"):
        ReasoningGymEnvironment(attempts=0)


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
        answer = await super().step(f"The {right} door.", tool_calls)
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


def test_server_that_is_not_there_costs_the_episodes(make_lm, toy_tokenizer, left_padded):
    pytest.importorskip("openenv")
    module = PPOModule(
        make_lm("llama").eval(),
        EnvironmentReward(),
        tokenizer=toy_tokenizer,
        environment=Episodes(factory=lambda: OpenEnvironment("http://127.0.0.1:9")),
    )
    module.configure_model()
    with pytest.raises(RuntimeError, match="1 of 1 environments failed.*Failed to connect to ws://127.0.0.1:9"):
        module.responder.draw(left_padded([[12]]), samples=1, iteration=0, batch=0)
