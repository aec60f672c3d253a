"""Switches of the settings of episodes, and of the environments."""

from __future__ import annotations

import asyncio
import copy
import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from switch_bench import ENDS, Bench
from switch_harness import Table, case, to

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.environments import (
    Done,
    Environment,
    OpenEnvironment,
    ReasoningGymEnvironment,
    Reply,
    ToolCall,
    ToolEnvironment,
    TRLEnvironment,
)
from lightning_rlhf.rewards import EnvironmentReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.rollout.episode_sampler import EpisodeError

ENTRY = json.dumps(
    {"task": "chain_sum", "config": {}, "entry": {"question": "", "answer": "7", "metadata": {}}},
)


class Talk(Environment):
    """Answers twice with a text, then ends; it opens with one if it is told to."""

    def __init__(self, text: str = " x y", opening: str | None = None) -> None:
        self.text, self.opening, self.turns = text, opening, 0

    def reset(self, row: Any) -> str | None:
        return self.opening

    def step(self, text: str, tool_calls: Any) -> Any:
        self.turns += 1
        return Done(3.0) if self.turns == 3 else Reply(self.text, 1.0)


class Late(Talk):
    """Takes a fifth of a second."""

    def step(self, text: str, tool_calls: Any) -> Any:
        time.sleep(0.2)
        return super().step(text, tool_calls)


class Half(Talk):
    """The first of them takes a fifth of a second at each turn."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        self.slow = Half.built % 6 == 0
        Half.built += 1

    def step(self, text: str, tool_calls: Any) -> Any:
        if self.slow:
            time.sleep(0.2)
        return super().step(text, tool_calls)


class Broken(Talk):
    """Every sixth cannot be asked."""

    built = 0

    def __init__(self) -> None:
        super().__init__()
        self.broken = Broken.built % 6 == 0
        Broken.built += 1

    def reset(self, row: Any) -> str | None:
        if self.broken:
            raise OSError("closed")
        return None


def table(bench: Bench) -> Table:
    def played(episodes: Episodes) -> PPOModule:
        policy = copy.deepcopy(bench.policy).eval()
        policy.generation_config.eos_token_id = ENDS
        module = PPOModule(
            policy,
            EnvironmentReward(),
            tokenizer=bench.tokenizer,
            generation=SamplingParams(max_new_tokens=4, samples_per_prompt=6),
            environment=episodes,
        )
        module.configure_model()
        return module

    def rollout(episodes: Episodes, rows: Any = None) -> Any:
        prompts = bench.prompts if rows is None else bench.prompts._replace(rows=rows)
        drawn = played(episodes).responder.collect(prompts, samples=6, iteration=0)
        return [drawn.tokens, drawn.response_mask, drawn.rewards]

    def outcome(episodes: Episodes, rows: Any = None) -> Any:
        try:
            return rollout(episodes, rows)
        except (EpisodeError, ValueError) as error:
            return type(error).__name__

    def opened(episodes: Episodes) -> Any:
        texts = [
            bench.tokenizer.decode(ids[mask])
            for ids, mask in zip(bench.prompts.tokens, bench.prompts.mask, strict=True)
        ]
        return outcome(episodes, [{"prompt": text} for text in texts])

    def passes(episodes: Episodes) -> int:
        """How many times turns are drawn: the slow episode's own passes come after those of the others."""
        module = played(episodes)
        engine: Any = module.engine
        draw: Callable[..., Any] = engine.generate
        count: list[int] = []
        engine.generate = lambda request: count.append(1) or draw(request)
        module.responder.collect(bench.prompts, samples=6, iteration=0)
        return len(count)

    def answers(environment: ToolEnvironment) -> Any:
        calls = [ToolCall("add", {"a": 1, "b": 2}), ToolCall("double", {"a": 4})]
        return [environment.step("", calls), environment.schemas()]

    def served(environment: OpenEnvironment) -> Any:
        """On a server that answers with what it was sent."""

        async def asked() -> Any:
            return [await environment.reset({"level": "hard"}), await environment.step("a", [])]

        package = types.ModuleType("openenv.core.generic_client")
        package.__dict__["GenericEnvClient"] = Mirror
        closed = types.ModuleType("websockets.exceptions")
        closed.__dict__["ConnectionClosed"] = ConnectionError
        with patch.dict(sys.modules, {package.__name__: package, closed.__name__: closed}):
            return asyncio.run(asked())

    def counted(environment: TRLEnvironment) -> Any:
        opening = environment.reset({"start": 4})
        answers = [environment.step("", calls) for calls in ([ToolCall("count", {})], [])]
        return [opening, answers, environment.schemas()]

    def graded(environment: ReasoningGymEnvironment) -> Any:
        """What three wrong answers and a right one in a sentence are answered; no more after the end."""
        environment.reset({"reasoning_gym": ENTRY})
        answers = (environment.step(text, []) for text in ("8", "it is 7", "8", "7"))
        said: list[Any] = []
        for answer in answers:
            said.append(answer)
            if isinstance(answer, Done):
                break
        return said

    return {
        Episodes: case(
            rollout,
            {"factory": Talk, "tokens": 20, "patience": 5.0},
            factory=to(lambda: Talk(" z")),
            turns=to(1),
            tokens=to(7),
            bytes=to(2),
            seconds=to(0.05, by=outcome, factory=Late),
            patience=to(0.0, by=passes, factory=Half),
            failures=to(0.9, by=outcome, factory=Broken),
            prompt_role=to("user", by=opened, factory=lambda: Talk(opening=" x")),
        ),
        OpenEnvironment: case(
            served,
            {"url": "ws://one"},
            url=to("ws://other"),
            action=to("word"),
            observation=to("text"),
            columns=to(["level"]),
        ),
        ReasoningGymEnvironment: case(
            graded,
            {"attempts": 4, "seconds": 60.0},
            attempts=to(1),
            extract=to("last_number"),
            seconds=to(1e-6),
        ),
        TRLEnvironment: case(
            counted, {"factory": Counter}, factory=to(Backwards), reward=to(shown), described=to(False)
        ),
        ToolEnvironment: case(answers, {"tools": [add]}, tools=to([add, double]), described=to(False)),
    }


class Mirror:
    """OpenEnv's client of a server that answers with what it was sent."""

    def __init__(self, url: str, message_timeout_s: float) -> None:
        self.url = url

    async def reset(self, seed: int, **columns: Any) -> Any:
        return self.answer(columns)

    async def step(self, action: dict[str, Any]) -> Any:
        return self.answer(action)

    def answer(self, sent: dict[str, Any]) -> Any:
        heard = f"{self.url} {sent}"
        return types.SimpleNamespace(observation={"message": heard, "text": heard[::-1]}, reward=1.0, done=False)


class Counter:
    """As TRL's `environment_factory` takes it."""

    by = 1

    def reset(self, start: int) -> str:
        self.number = start
        return f"from {start}"

    def count(self) -> int:
        """Count one further."""
        self.number += self.by
        return self.number


class Backwards(Counter):
    by = -1


def shown(counter: Counter) -> float:
    return float(counter.number)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def double(a: int) -> int:
    """Double a number.

    Args:
        a: the number.
    """
    return 2 * a
