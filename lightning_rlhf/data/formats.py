"""What a record says: a prompt, a demonstration, a ranking or a document."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lightning_rlhf.data.columns import Columns
from lightning_rlhf.text import Prompt, answer, checked_messages, checked_prompt
from lightning_rlhf.types import Row


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer to imitate."""

    prompt: Prompt
    response: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """K responses to one prompt.

    Attributes:
        prompt: what they answer.
        responses: K texts.
        places: K numbers, lower is better, equal are ties.
        strength: the labeler's ratings, K finite numbers, higher is better; None where the row has none.
    """

    prompt: Prompt
    responses: list[str]
    places: list[float]
    strength: list[float] | None = None


def prompt_of(row: Row, columns: Columns) -> Prompt:
    """The prompt of `{"prompt"}`.

    Raises:
        ValueError: the key is missing or is neither a text nor messages.
    """
    return checked_prompt(_value(row, columns.prompt, "prompt"), columns.prompt)


def text_of(row: Row, columns: Columns) -> str:
    """The document of `{"text"}`.

    Raises:
        ValueError: the key is missing or is no text.
    """
    text = _value(row, columns.text, "text")
    if not isinstance(text, str):
        raise ValueError(f"`{columns.text}` must be a text, found {type(text).__name__}: {str(text)[:80]}")
    return text


def demonstration_of(row: Row, columns: Columns) -> Demonstration:
    """The demonstration of `{"prompt", "response"}`.

    Raises:
        ValueError: a key is missing or has another type.
    """
    prompt = prompt_of(row, columns)
    return Demonstration(prompt, answer(_value(row, columns.response, "response"), columns.response, prompt))


def ranking_of(row: Row, columns: Columns) -> Ranking:
    """The ranking of a pair, of K responses with scores or ranks, or of NeMo-RL's completions, in this precedence.

    `{"prompt", "chosen", "rejected", "margin"}`, the prompt and the margin optional; `{"prompt", "responses", "scores"
    | "ranks"}`; `{"context", "completions": [{"rank", "completion"}]}`. Ratings are the scores, or the margin and 0.

    Raises:
        ValueError: none of these, or one with a missing key, another type or lists of different lengths.
    """
    if columns.chosen in row or columns.rejected in row:
        return _pair(row, columns)
    if columns.responses in row:
        return _listed(row, columns)
    if "completions" in row:
        return _completions(row)
    raise ValueError(
        f"no ranking found among the keys {sorted(row)}: needed are `{columns.chosen}` and `{columns.rejected}`, or "
        f"`{columns.responses}` with `{columns.scores}` or `{columns.ranks}`, or `context` with `completions`; "
        "keys can be renamed with `columns`"
    )


def _value(row: Row, key: str, column: str) -> Any:
    if key not in row:
        raise ValueError(
            f"no key `{key}`; found {sorted(row)}: add it, or name the key to read instead with `columns.{column}`"
        )
    return row[key]


def _pair(row: Row, columns: Columns) -> Ranking:
    chosen, rejected = (_value(row, getattr(columns, side), side) for side in ("chosen", "rejected"))
    if columns.prompt in row or columns.prompt != Columns.prompt:  # a key that was named on purpose must be there
        prompt = prompt_of(row, columns)
    else:
        prompt, chosen, rejected = _split_pair(chosen, rejected, columns)
    responses = [answer(chosen, columns.chosen, prompt), answer(rejected, columns.rejected, prompt)]
    strength = [_margin(row, columns), 0.0] if columns.margin in row else None
    return Ranking(prompt, responses, [0.0, 0.0 if responses[0] == responses[1] else 1.0], strength)


def _margin(row: Row, columns: Columns) -> float:
    margin = _number(row[columns.margin], columns.margin)
    if margin < 0:
        raise ValueError(
            f"`{columns.margin}` must be at least 0, found {margin}: it says by how much `{columns.chosen}` is better "
            f"than `{columns.rejected}`; swap the two, or name another key with `columns.margin`"
        )
    return margin


def _split_pair(chosen: Any, rejected: Any, columns: Columns) -> tuple[Prompt, Any, Any]:
    """The implicit prompt of two dialogues and what follows it in each.

    Messages: all but the last. Texts: the longest common beginning, its last space left to the responses (TRL's
    `extract_prompt`).
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = commonprefix([chosen, rejected]).removesuffix(" ")
        if not prompt:
            raise ValueError(
                f"no key `{columns.prompt}`, and `{columns.chosen}` and `{columns.rejected}` have no common beginning "
                f"to take as the prompt; found {chosen[:40]!r} and {rejected[:40]!r}: add the prompt, or name its key "
                "with `columns.prompt`"
            )
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    chosen, rejected = checked_messages(chosen, columns.chosen), checked_messages(rejected, columns.rejected)
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise ValueError(
            f"no key `{columns.prompt}`, and `{columns.chosen}` and `{columns.rejected}` are not one dialogue with two "
            "last messages: all but the last must be equal and at least one; add the prompt"
        )
    return checked_prompt(chosen[:-1], columns.chosen), chosen[-1:], rejected[-1:]


def _listed(row: Row, columns: Columns) -> Ranking:
    prompt, responses = prompt_of(row, columns), row[columns.responses]
    if columns.scores in row and columns.ranks in row:
        raise ValueError(
            f"both `{columns.scores}` and `{columns.ranks}` are there: point `columns.scores` or `columns.ranks` at a "
            "key that is not, to say which to leave out"
        )
    if columns.scores not in row and columns.ranks not in row:
        raise ValueError(
            f"no key `{columns.scores}` (higher is better) or `{columns.ranks}` (lower is better); found "
            f"{sorted(row)}: add one, or name its key with `columns.scores` or `columns.ranks`"
        )
    key, sign = (columns.scores, -1.0) if columns.scores in row else (columns.ranks, 1.0)
    numbers = row[key]
    if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
        raise ValueError(
            f"`{columns.responses}` and `{key}` must be lists of equal length, found {_size(responses)} "
            f"and {_size(numbers)}"
        )
    numbers = [_number(number, key) for number in numbers]
    strength = numbers if columns.scores in row else None
    return _ranking(prompt, responses, [sign * number for number in numbers], columns.responses, strength)


def _completions(row: Row) -> Ranking:
    prompt, entries = checked_prompt(_plain(row, "context"), "context"), row["completions"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"`completions` must be a list of {{'rank', 'completion'}}, found {str(entries)[:80]}")
    places = [_number(_plain(entry, "rank"), "completions.rank") for entry in entries]
    return _ranking(prompt, [_plain(entry, "completion") for entry in entries], places, "completions")


def _ranking(
    prompt: Prompt, responses: list[Any], places: list[float], key: str, strength: list[float] | None = None
) -> Ranking:
    if len(responses) < 2:
        raise ValueError(f"`{key}` needs at least 2 responses to compare, found {len(responses)}: remove the row")
    return Ranking(prompt, [answer(response, key, prompt) for response in responses], places, strength)


def _plain(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key `{key}` beside {sorted(row)}: the format with `completions` needs it")
    return row[key]


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{key}` must hold finite numbers, found {value!r}")
    return float(value)


def _size(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
