"""Switches of judges and of programs as rewards: what reaches a fake server or a program, and what comes of it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from fake_chat import FakeChat
from switch_harness import Table, case, to

from lightning_rlhf.rewards import ChatModel, Judge, PairwiseJudge, PerResponse, ProgramReward
from lightning_rlhf.rewards.program import Run

TEXTS = ["it is 7", "it is 8, or 7", "7", "<note>8</note>", "8", "none"]
LIMITS = """import resource as r
most = [r.getrlimit(kind)[0] for kind in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_CPU, r.RLIMIT_NPROC)]
print(most[0] // 2**20 + most[1] // 2**20 + most[2] + min(most[3] % 2**63, 5000))"""
TOLD_LIMITS = ["python", "-c", LIMITS]
SEVENS = ["python", "-c", "import json, sys\nr = json.load(sys.stdin)['response']\nprint('no' if '7' in r else len(r))"]


def longest(prompt: Any, response: str) -> float:
    return float(len(response))


def shortest(prompt: Any, response: str) -> float:
    return -float(len(response))


def scores(reward: Any) -> list[float]:
    return reward.score([None] * len(TEXTS), TEXTS)


def most_at_once(reward: PerResponse | ProgramReward) -> int:
    """Most calls that ran together, of six that wait for each other where they can."""
    lock, meeting, counts = threading.Lock(), threading.Barrier(6), [0, 0]

    def meet(*_: Any) -> None:
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.05)
        with lock:
            counts[0] -= 1

    if isinstance(reward, PerResponse):
        reward.fn = meet
    else:
        reward._run = lambda request: Run(meet() or 0.0)
    scores(reward)
    return counts[1]


def told(call: Callable[[], Any]) -> Any:
    """Result of a call, or its error up to what differs from run to run."""
    try:
        return call()
    except RuntimeError as error:
        return str(error).split("http://")[0]


def judges() -> Table:
    here, there = (FakeChat(lambda message, body: "") for _ in range(2))

    def served(reply: Callable[[str, dict], str], fault: Callable[[int, dict], Any] = lambda n, body: None) -> None:
        for server in (here, there):
            server.reply, server.fault, server.busiest = reply, fault, 0
            server.bodies.clear()
            server.headers.clear()

    def readings(chat: ChatModel) -> Any:
        messages = dict(enumerate(TEXTS))
        return told(lambda: chat.readings(messages, lambda text: text or None, prompts=TEXTS, source="it"))

    def requests(chat: ChatModel) -> list[Any]:
        """What reaches either server, in no order."""
        served(lambda message, body: "1")
        readings(chat)
        kept = ("Authorization",)
        headers = [[server.headers[0].get(name) for name in kept] for server in (here, there) if server.headers]
        return [[sorted(map(repr, server.bodies)) for server in (here, there)], headers]

    def number_unread(chat: ChatModel) -> int:
        served(lambda message, body: "")
        readings(chat)
        return len(here.bodies)

    def late(chat: ChatModel) -> Any:
        served(lambda message, body: "1", lambda n, body: 0.4)
        return readings(chat)

    def failing_once(chat: ChatModel) -> Any:
        served(lambda message, body: "1", lambda n, body: 503 if n < len(TEXTS) else None)
        return str(readings(chat))[:20]

    def busiest(chat: ChatModel) -> bool:
        served(lambda message, body: "1", lambda n, body: 0.1)
        readings(chat)
        return here.busiest > 1

    def asked_twice(chat: ChatModel) -> int:
        served(lambda message, body: "1")
        readings(chat)
        readings(chat)
        return len(here.bodies)

    def judged(judge: Judge) -> Any:
        served(lambda message, body: f"<score>{len(message) % 4 + body['seed']}</score> 3")
        return [told(lambda: scores(judge)), sorted(body["messages"][0]["content"] for body in here.bodies)]

    def preferred(judge: PairwiseJudge) -> Any:
        served(lambda message, body: f"<better>{'AB'[(len(message) + body['seed']) % 2]}</better> tie")
        return told(lambda: judge(TEXTS, TEXTS, TEXTS[::-1]))

    def unread(judge: Judge | PairwiseJudge) -> Any:
        served(lambda message, body: "")
        return told(lambda: judge([None], ["a"], ["b"]) if isinstance(judge, PairwiseJudge) else scores(judge))

    chat = {"url": here.url, "model": "m"}
    model, other = ChatModel(**chat), ChatModel(**chat, seed=1)
    return {
        ChatModel: case(
            requests,
            chat,
            url=to(there.url),
            model=to("n"),
            key_from=to("HOME"),
            temperature=to(0.5),
            max_tokens=to(9),
            seed=to(1),
            attempts=to(1, by=number_unread),
            fields=to({"top_p": 0.5}),
            timeout=to(0.1, by=late, patience=0.0),
            patience=to(0.0, by=failing_once),
            concurrency=to(1, by=busiest),
            cache=to(tempfile.mkdtemp(), by=asked_twice),
        ),
        Judge: case(
            judged,
            {"chat": model},
            chat=to(other),
            template=to("{response}: <score>"),
            parse=to(r"(\d)"),
            lowest=to(-1.0),
            highest=to(1.0),
            rescale=to(True),
            unparsed=to(2.5, by=unread),
        ),
        PairwiseJudge: case(
            preferred,
            {"chat": model},
            chat=to(other),
            template=to("{first}{second}{second}"),
            parse=to("(tie)"),
            unparsed=to(0.5, by=unread),
        ),
    }


def table(bench: Any) -> Table:
    return judges() | {
        PerResponse: case(scores, {"fn": longest}, fn=to(shortest), concurrency=to(1, by=most_at_once)),
        ProgramReward: case(
            scores,
            {"command": TOLD_LIMITS},
            command=to(SEVENS),
            seconds=to(5.0),
            memory=to(2**30),
            file_size=to(2**20),
            processes=to(4000),
            concurrency=to(1, by=most_at_once),
            failed=to(-1.0, command=SEVENS),
        ),
    }
