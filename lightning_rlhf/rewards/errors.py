"""Failure of a reward: one error on every process, with a record of its input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_rlhf.rewards.reward import Reward, Scores
from lightning_rlhf.rewards.text import texts_of
from lightning_rlhf.types import Rollout, Row

T = TypeVar("T")
FOLDER = "failed-rewards"
"""Folder, in that of the run, of the prompts and responses of rollouts that could not be scored."""


class RewardError(ValueError):
    """Error of a reward that raised, timed out or returned anything but one finite number per response."""


def scored_or_told(
    reward: Reward, rollout: Rollout, rows: Sequence[Row], *, agreed: Callable[[bool], bool], iteration: int, run: Path
) -> Scores:
    """Return the reward's checked scores once it succeeded on every process.

    Args:
        reward: called once.
        rollout: B responses.
        rows: the records of their prompts.
        agreed: whether something is true on every process.
        iteration: which rollout it is, for the error and the file in `FOLDER`.
        run: folder of the run.

    Raises:
        RewardError: it failed here or on another process.
    """

    def score() -> Scores:
        scores = reward.scored(rollout, rows)
        total = scores.complete(rows, source=type(reward).__name__, dtype=rollout.logprobs.dtype)
        return Scores(total, scores.parts, objectives=scores.objectives)

    scores, problem = _attempt(score)
    if agreed(problem is None):
        return scores
    if problem is None:
        raise RewardError(f"rollout {iteration}: the reward failed on another process, which says more")
    path = run / FOLDER / f"rollout-{iteration}.process-{os.getpid()}.jsonl"
    location = _written(reward, rollout, rows, path)
    raise RewardError(
        f"rollout {iteration}: the reward failed with {type(problem).__name__}: {problem}. {location}; nothing was "
        "learned from them, and the last checkpoint is whole: mend the reward and resume"
    ) from problem


def _written(reward: Reward, rollout: Rollout, rows: Sequence[Row], path: Path) -> str:
    """Write the prompts and responses to a file and return a sentence with its path."""
    tokens = rollout.tokens[:, rollout.prompt_width :].tolist()
    responses: list[Any] = [row[:length] for row, length in zip(tokens, rollout.extents.tolist(), strict=True)]
    if reward.tokenizer is not None:
        responses = texts_of(responses, reward.tokenizer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair
            for row, response in zip(rows, responses, strict=True):
                file.write(json.dumps(dict(row) | {"response": response}, ensure_ascii=False, default=str) + "\n")
    except OSError as error:
        return f"Its prompts and responses could not be written ({error})"
    return f"Its prompts and responses are in {path}"


def on_all(call: Callable[[], T], *, agreed: Callable[[bool], bool], what: str) -> T:
    """Return the result of `call` once it succeeded on every process. Otherwise the waiting ones would hang.

    Args:
        call: runs no collective.
        agreed: whether something is true on every process.
        what: failed, for the error.

    Raises:
        ValueError: it failed here or on another process.
    """
    result, problem = _attempt(call)
    if agreed(problem is None):
        return result
    if problem is None:
        raise ValueError(f"{what} failed on another process, which says more")
    raise ValueError(f"{what} failed with {type(problem).__name__}: {problem}") from problem


def _attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result of a call or the exception it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error
