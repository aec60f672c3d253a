"""Rewards by regular expression: a match, or tags in order."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from lightning_rlhf.rewards.reward import TextReward

NO_COLUMNS = ("prompt", "prompts", "responses")
"""Names that a reward gets as texts rather than as columns."""
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?([eE][+-]?\d{1,4})?|[+-]?\.\d+([eE][+-]?\d{1,4})?")


class RegexMatch(TextReward):
    """Score 1 for a response that a regular expression finds or whose match equals a column of the row, else 0.

    With `column` the last match counts, and of it the first group: equal texts without surrounding space, or equal
    numbers (1,000 is 1000.0). A row without the column is not its task (None).

    Args:
        pattern: a regular expression as of `re.search`, with flags in it, such as `(?s)` or `(?i)`.
        column: that holds the right answer; None: any match is right.

    Raises:
        ValueError: it is no regular expression, or has no group although there is a `column`.
    """

    def __init__(self, pattern: str, column: str | None = None) -> None:
        check_column(column)
        self.pattern, self.column = pattern, column
        self._regex = compiled(pattern, needs_group=column is not None)

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> list[float | None]:
        """Return 1, 0 or None for each response."""
        if self.column is None:
            return [float(self._regex.search(response) is not None) for response in responses]
        right = columns.get(self.column, [None] * len(responses))
        return [self._compared(response, answer) for response, answer in zip(responses, right, strict=True)]

    def _compared(self, response: str, answer: Any) -> float | None:
        return None if answer is None else float(same(last_group(self._regex, response), str(answer)))


class Format(TextReward):
    """Score 1 for a response that is its tagged sections in their order with nothing but space around them, else 0.

    Each tag stands in it once: `<think>…</think><answer>…</answer>`. Tags that are special tokens of the tokenizer
    count as well. Where the chat template writes the first tag, it is part of the prompt: leave it out of `tags`.

    Args:
        tags: names of the sections, of letters, digits and underscores.

    Raises:
        ValueError: there is no tag, one occurs twice or has another character.
    """

    def __init__(self, tags: list[str] | tuple[str, ...] = ("think", "answer")) -> None:
        wrong = [tag for tag in tags if not re.fullmatch(r"\w+", tag)]
        if wrong or not tags or len(set(tags)) < len(tags):
            raise ValueError(f"`tags` must be different names of letters, digits or '_', at least one: got {[*tags]}")
        self.tags = list(tags)
        sections = (rf"<{tag}>(?:(?!</?(?:{'|'.join(tags)})>).)*</{tag}>" for tag in tags)
        self._regex = re.compile(r"\s*".join(["", *sections, ""]), re.DOTALL)

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> list[float]:
        """Return 1 or 0 for each response."""
        return [float(self._regex.fullmatch(response) is not None) for response in responses]


def check_column(column: str | None) -> None:
    """Raise ValueError if no column of that name reaches a reward."""
    if column in NO_COLUMNS:
        raise ValueError(f"`column` must be another than {', '.join(NO_COLUMNS)}: got {column!r}, so rename it")


def compiled(pattern: str, *, needs_group: bool) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ValueError: it is none, or has no group and needs one.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`pattern` must be a regular expression: got {pattern!r}, {error}") from error
    if needs_group and regex.groups == 0:
        raise ValueError(rf"`pattern` must have a group, as in 'Answer: (\d+)', to be compared: got {pattern!r}")
    return regex


def last_group(regex: re.Pattern[str], text: str) -> str | None:
    """Return the first group of the last match; None if there is no match or the group is not part of it."""
    last = None
    for last in regex.finditer(text):  # noqa: B007
        pass
    return None if last is None else last[1]


def same(found: str | None, right: str) -> bool:
    """Compare two texts without surrounding space, as numbers where both are."""
    if found is None:
        return False
    one, other = found.strip(), right.strip()
    if _NUMBER.fullmatch(one) and _NUMBER.fullmatch(other):
        return Decimal(one.replace(",", "")) == Decimal(other.replace(",", ""))
    return one == other
