"""Functions that wait: `async def`, and one call per response, in threads or in a loop."""

from __future__ import annotations

import asyncio
import functools
import threading
import time

import pytest

from lightning_rlhf.rewards import FunctionReward, PerResponse, TimedReward, WeightedReward, as_reward
from lightning_rlhf.rewards.concurrent import is_async

PROMPTS = [f"question {i}" for i in range(8)]
RESPONSES = [f"{i}" for i in range(8)]
DELAY = 0.25


async def slow_async(prompt, response, **columns):
    await asyncio.sleep(DELAY * (1 - int(response) / 16))  # the first is the last to end
    return float(response)


def slow(prompt, response, **columns):
    time.sleep(DELAY * (1 - int(response) / 16))
    return float(response)


class Slow:
    async def __call__(self, prompt, response):
        return await slow_async(prompt, response)


BOTH = pytest.mark.parametrize("fn", [slow, slow_async], ids=["threads", "loop"])


@pytest.fixture(autouse=True)
def nothing_left():
    """No thread and no loop outlives a test."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left


@pytest.mark.parametrize("fn", [slow, slow_async, Slow(), functools.partial(slow_async)])
def test_wall_time_is_that_of_the_slowest_and_the_order_that_of_the_responses(fn):
    start = time.monotonic()
    assert PerResponse(fn).score(PROMPTS, RESPONSES) == [float(i) for i in range(8)]
    assert DELAY * 0.9 < time.monotonic() - start < 4 * DELAY  # one by one: 6 delays


@BOTH
def test_no_more_than_concurrency_run_at_once(fn):
    start = time.monotonic()
    assert PerResponse(fn, concurrency=2).score(PROMPTS, RESPONSES) == [float(i) for i in range(8)]
    assert time.monotonic() - start > 2.5 * DELAY


def test_async_functions_are_told_from_plain_ones():
    assert [is_async(fn) for fn in (slow_async, Slow(), functools.partial(slow_async))] == [True] * 3
    assert [is_async(fn) for fn in (slow, functools.partial(slow), len)] == [False] * 3


def test_function_of_a_whole_rollout_may_be_async(make_rollout, toy_tokenizer):
    async def correct(prompts, responses, answer):
        await asyncio.sleep(0)
        return [None if right is None else float(right) for right in answer]

    reward = as_reward(correct)
    assert isinstance(reward, FunctionReward)
    reward.check_columns({"prompt", "answer"})
    with pytest.raises(ValueError, match="correct needs answer"):
        reward.check_columns({"prompt"})
    reward.prepare(toy_tokenizer)
    rollout = make_rollout([[10], [11]], [[13, 0], [14, 0]])
    scores = reward.scored(rollout, [{"prompt": "a", "answer": 2}, {"prompt": "b"}])
    assert scores.answered.tolist() == [True, False]
    assert scores.total[0] == 2.0


@pytest.mark.parametrize("kind", [lambda fn: fn, lambda fn: lambda *texts: fn(*texts)], ids=["def", "lambda"])
def test_error_of_an_async_function_is_its_own(kind):
    async def broken(prompts, responses):
        raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        FunctionReward(kind(broken)).score(PROMPTS, RESPONSES)


@BOTH
def test_cells_of_the_named_columns_reach_it(make_rollout, toy_tokenizer, fn):
    seen = {}

    def score(prompt, response, topic):
        seen[prompt] = (response, topic)
        return None if topic is None else 1.0

    async def score_async(prompt, response, topic):
        return score(prompt, response, topic)

    reward = PerResponse(score if fn is slow else score_async)
    reward.prepare(toy_tokenizer)
    rows = [{"prompt": "a", "topic": "x", "response": "gold"}, {"prompt": "b", "response": "gold"}]
    scores = reward.scored(make_rollout([[10], [11]], [[13, 0], [14, 0]]), rows)
    assert seen == {"a": ("d", "x"), "b": ("e", None)}
    assert scores.answered.tolist() == [True, False]
    with pytest.raises(ValueError, match="needs topic"):
        reward.check_columns({"prompt"})


@BOTH
def test_column_called_response_does_not_break_the_call(fn):
    assert PerResponse(fn).score(PROMPTS[:1], RESPONSES[:1], response=["9"]) == [0.0]


@BOTH
def test_failure_names_the_row_and_ends_the_rest(fn):
    ended = []

    def step(response):
        if response == "2":
            raise ZeroDivisionError("by hand")

    def plain(prompt, response):
        step(response)
        time.sleep(0.1)
        ended.append(response)

    async def waiting(prompt, response):
        step(response)
        await asyncio.sleep(0.1)
        ended.append(response)

    reward = PerResponse(plain if fn is slow else waiting, concurrency=3)
    with pytest.raises(RuntimeError, match="for response 2.*'question 2'.*ZeroDivisionError: by hand") as raised:
        reward.score(PROMPTS, RESPONSES)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    time.sleep(0.3)
    if fn is slow_async:
        assert ended == []
    assert set(ended) <= {"0", "1"}


async def all_slow(prompts, responses):
    return [await slow_async(*texts) for texts in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize(
    "reward", [PerResponse(slow), PerResponse(slow_async), FunctionReward(all_slow)], ids=["threads", "loop", "whole"]
)
def test_it_works_below_a_running_loop_and_in_another_thread(reward):
    expected = [float(i) for i in range(8)]

    async def notebook():
        return reward.score(PROMPTS, RESPONSES)

    assert asyncio.run(notebook()) == expected
    results = []
    thread = threading.Thread(target=lambda: results.append(reward.score(PROMPTS, RESPONSES)))
    thread.start()
    thread.join()
    assert results == [expected]


@BOTH
def test_timed_reward_around_it_ends_it(make_rollout, toy_tokenizer, fn):
    cancelled = []

    async def forever(prompt, response):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(prompt)
            raise

    def long(prompt, response):
        time.sleep(1.0)

    timed = TimedReward(PerResponse(long if fn is slow else forever), seconds=0.3)
    timed.prepare(toy_tokenizer)
    rollout = make_rollout([[10], [11]], [[13, 0], [14, 0]])
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        timed.scored(rollout, [{"prompt": "a"}, {"prompt": "b"}])
    assert time.monotonic() - start < 10
    assert sorted(cancelled) == ([] if fn is slow else ["a", "b"])


def test_it_is_a_part_of_a_sum(make_rollout, toy_tokenizer):
    async def one(prompts, responses):
        return [1.0] * len(responses)

    both = WeightedReward({"one": one, "length": PerResponse(lambda prompt, response: len(response))})
    both.prepare(toy_tokenizer)
    assert both(make_rollout([[10], [11]], [[13, 0], [14, 15, 0]]), [{}, {}]).tolist() == [2.0, 4.0]


def test_empty_rollout_has_no_scores():
    assert PerResponse(slow).score([], []) == []
    assert PerResponse(slow_async).score([], []) == []


def test_identity_is_that_of_the_function_alone():
    assert PerResponse(slow, concurrency=1).identity() == PerResponse(slow).identity()


def test_concurrency_of_0_is_refused():
    with pytest.raises(ValueError, match="`concurrency` must be a number above 0: got 0"):
        PerResponse(slow, concurrency=0)
