"""Program of the process that makes rows of a Reasoning Gym task.

It reads `{task, config, size, seed}` and writes `rows` or `problem`, as JSON. Some tasks go through sets, so that
their rows depend on the seed of Python's hashes: here it is fixed, and so all processes of a run have the same rows.
"""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from typing import Any

COMPARED = 16
"""Rows that are made twice and graded, to refuse tasks without a seed or whose entries are no JSON."""


def rows_of(task: str, config: dict[str, Any], size: int, seed: int) -> list[dict[str, Any]]:
    """Make the rows: `question`, `answer` and `metadata` each.

    Raises:
        ValueError: there is no such task, its settings are wrong, its rows differ from time to time, or its grader
            needs what JSON can't hold.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        near = get_close_matches(task, DATASETS) or sorted(DATASETS)
        raise ValueError(f"there is no task {task!r}: such as {', '.join(near[:5])}")
    try:
        first, again = (reasoning_gym.create_dataset(task, **config, size=size, seed=seed) for _ in range(2))
    except (TypeError, AssertionError) as error:
        raise ValueError(f"`config` {config} does not fit the task {task}: {error}") from error
    entries = [first[i] for i in range(size)]
    rows = json.loads(json.dumps([_row(entry) for entry in entries], default=str))
    compared = min(size, COMPARED)
    if rows[:compared] != json.loads(json.dumps([_row(again[i]) for i in range(compared)], default=str)):
        raise ValueError(f"the task {task} gives other rows each time, so that no run could be resumed: take another")
    for entry, row in zip(entries[:compared], rows, strict=False):
        if _score(first, entry) != _score(first, row):
            raise ValueError(f"the task {task} grades by what is no JSON, and so can't be in a log: take another")
    return rows


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("question", "answer", "metadata")}


def _score(dataset: Any, entry: dict[str, Any]) -> Any:
    try:
        return dataset.score_answer(entry["answer"], entry)
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Answer the one request."""
    try:
        reply: dict[str, Any] = {"rows": rows_of(**json.load(sys.stdin))}
    except ValueError as error:
        reply = {"problem": str(error)}
    print(f"\n{json.dumps(reply)}")  # last, after what a task prints


if __name__ == "__main__":
    main()
