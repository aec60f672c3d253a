"""Readers of a record of comparisons: K responses to one prompt with their ranking."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.formats import Answer, answered, one_of, prompt_key, split_pair, value_of
from lightning_rlhf.text import Prompt, checked_prompt
from lightning_rlhf.types import Row

PAIR_RATINGS = ("score_chosen", "score_rejected")
"""Keys of the two responses' ratings in binarized UltraFeedback and similar data."""
_UNPAIRED = "a `label` rates one `completion` and compares no two: `LabeledDataModule` reads it, for `KTO`"
_WRITTEN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""Pattern of a number as text."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """K ranked responses to one prompt.

    Attributes:
        prompt: what they answer.
        responses: K answers, texts or the messages that follow the prompt.
        places: K numbers, lower is better, equal are ties.
        strength: the labeler's ratings, K finite numbers, higher is better; None if the row has none.
        systems: who wrote each, K names; None if the row has none.
    """

    prompt: Prompt
    responses: list[Answer]
    places: list[float]
    strength: list[float] | None = None
    systems: list[str] | None = None


def ranking_of(row: Row, columns: ColumnNames) -> Ranking:
    """Return the ranking of a pair, of K scored or ranked responses or of NeMo-RL's completions.

    `{"prompt", "chosen", "rejected", "margin"}`, the prompt and the margin optional, or `score_chosen` and
    `score_rejected` for the margin; `{"prompt", "responses", "scores" | "ranks", "systems"}`, the last optional;
    `{"context", "completions": [{"rank", "completion"}]}`. Ratings are the scores, or the margin and 0.

    Raises:
        ValueError: none of these or several, or one with a missing key, another type or lists of different lengths.
    """
    pair = columns.chosen in row or columns.rejected in row
    listed, completions = columns.responses in row, "completions" in row
    one_of({columns.chosen: pair, columns.responses: listed, "completions": completions}, "the ranking", "responses")
    if pair:
        return _pair(row, columns)
    if listed:
        return _listed(row, columns)
    if completions:
        return _completions(row)
    unpaired = "completion" in row and "label" in row
    raise ValueError(
        f"no ranking found among the keys {sorted(row)}: needed are `{columns.chosen}` and `{columns.rejected}`, or "
        f"`{columns.responses}` with `{columns.scores}` or `{columns.ranks}`, or `context` with `completions`; "
        + (_UNPAIRED if unpaired else "keys can be renamed with `columns`")
    )


def _pair(row: Row, columns: ColumnNames) -> Ranking:
    key = prompt_key(row, columns)
    if key is None:
        prompt, chosen, rejected = split_pair(row, columns)
    else:
        prompt = checked_prompt(value_of(row, key, "prompt"), key)
        chosen, rejected = (value_of(row, getattr(columns, side), side) for side in ("chosen", "rejected"))
    prompt, responses = answered(prompt, [chosen, rejected], [columns.chosen, columns.rejected])
    places = [0.0, 0.0 if responses[0] == responses[1] else 1.0]
    return Ranking(prompt, responses, places, _ratings(row, columns))


def _ratings(row: Row, columns: ColumnNames) -> list[float] | None:
    better, worse = PAIR_RATINGS
    if columns.margin in row:
        ratings, name = [_rating(row[columns.margin], columns.margin), 0.0], f"`{columns.margin}`"
    elif better in row and worse in row:
        ratings, name = [_rating(row[key], key) for key in PAIR_RATINGS], f"`{better}` less `{worse}`"
    else:
        return None
    if ratings[0] < ratings[1]:
        raise ValueError(
            f"{name} must be at least 0, found {ratings[0] - ratings[1]}: it says by how much `{columns.chosen}` is "
            f"better than `{columns.rejected}`; swap the two, or name another key with `columns.margin`"
        )
    return ratings


def _listed(row: Row, columns: ColumnNames) -> Ranking:
    prompted = prompt_key(row, columns) or columns.prompt
    prompt, responses = checked_prompt(value_of(row, prompted, "prompt"), prompted), row[columns.responses]
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
    ranking = _ranking(prompt, responses, [sign * number for number in numbers], columns.responses, strength)
    return replace(ranking, systems=_systems(row, columns, len(responses)))


def _systems(row: Row, columns: ColumnNames, count: int) -> list[str] | None:
    if columns.systems not in row:
        return None
    names = row[columns.systems]
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"`{columns.systems}` must be a list of {count} names, one per response, found {str(names)[:80]}; where it "
            "holds something else, point `columns.systems` at another key"
        )
    return names


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
    prompt, answers = answered(prompt, responses, [key] * len(responses))
    return Ranking(prompt, answers, places, strength)


def _plain(row: Row, key: str) -> Any:
    if key not in row:
        raise ValueError(f"no key `{key}` beside {sorted(row)}: the format with `completions` needs it")
    return row[key]


def _rating(value: Any, key: str) -> float:
    """Parse the number of a cell, which CSV holds as text."""
    return _number(float(value) if isinstance(value, str) and _WRITTEN.fullmatch(value) else value, key)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"`{key}` must hold finite numbers, found {value!r}")
    return float(value)


def _size(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, list) else f"a {type(value).__name__}"
