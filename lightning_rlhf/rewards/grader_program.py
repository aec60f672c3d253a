"""Program of the process that grades answers with math-verify or Reasoning Gym.

It reads one JSON object a line and writes one: `score`, or `problem`. It imports nothing of this library, so that it
starts fast, and a grader that hangs, crashes or fills the memory is ended with it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MEMORY = 2**33
"""Most address space, bytes: the powers in a response may be larger than any memory."""


def main(package: str) -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a grader prints is no reply
    limit_memory()
    try:
        grade = {"math_verify": math_grader, "reasoning_gym": gym_grader}[package]()
        print(json.dumps({}), file=replies, flush=True)
    except Exception as error:
        print(json.dumps({"problem": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        return
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"score": float(grade(**json.loads(line)))}
        except (Exception, RecursionError) as error:
            reply = {"problem": type(error).__name__}
        print(json.dumps(reply), file=replies, flush=True)


def limit_memory() -> None:
    """Limit the address space where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        return


def math_grader() -> Any:
    """Build the function that compares a response with the right answer as mathematics."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    unlimited = {"parsing_timeout": None, "raise_on_error": True}  # its signals work in the main thread only

    def grade(gold: str, response: str) -> bool:
        delimited = any(mark in gold for mark in ("$", "\\boxed", "\\(", "\\["))
        right = parse(gold if delimited else f"${gold}$", forms, **unlimited)
        if not right:
            raise ValueError("the right answer can't be read")
        given = parse(response, forms, **unlimited)
        try:
            return verify(right, given, timeout_seconds=None, raise_on_error=True)
        except Exception:
            if verify(right, given, timeout_seconds=None):  # another reading of the two
                return True
            raise

    return grade


def gym_grader() -> Any:
    """Build the function that scores an answer by the task's own rules."""
    import reasoning_gym

    tasks: dict[str, Any] = {}

    def grade(task: str, config: dict[str, Any], answer: str, entry: dict[str, Any]) -> float:
        key = json.dumps([task, config], sort_keys=True)
        if key not in tasks:
            tasks[key] = reasoning_gym.create_dataset(task, **{"seed": 0, "size": 1} | config)
        return tasks[key].score_answer(answer, entry)

    return grade


if __name__ == "__main__":
    main(sys.argv[1])
