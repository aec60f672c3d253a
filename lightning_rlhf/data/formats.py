"""Readers of a record: a prompt, a demonstration or a document under our keys or those of other libraries.

The other libraries are TRL, OpenRLHF and NeMo-RL.

A key named with `ColumnNames` is read and no other. Under the default names our key comes first, then those of the
others; two of theirs in one row are an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, TypeAlias

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.text import Message, Prompt, as_dialogue, checked_answer, checked_messages, checked_prompt
from lightning_rlhf.types import Row

Answer: TypeAlias = str | list[Message]
"""The text of a response; or messages, the assistant's first and last."""
_ASSISTANT = "\n\nAssistant:"
"""Start of an assistant's turn in the plain-text dialogues of Bai et al. 2022."""


def answered(prompt: Prompt, values: Sequence[Any], keys: Sequence[str]) -> tuple[Prompt, list[Answer]]:
    """Split off the prompt from the dialogues that hold its answers.

    Answers may be texts, the messages that follow the prompt, or whole dialogues. A text prompt that whole dialogues
    repeat is one of their messages, so the prompt is then their common beginning (as TRL takes it).

    Args:
        prompt: what they answer.
        values: what the row holds, one or more.
        keys: the key each came from, for errors.

    Returns:
        prompt and answers, each without the messages of the prompt.

    Raises:
        ValueError: an answer is neither a text nor messages that end with the assistant's, or has messages in front
            that are not the prompt and would be lost.
    """
    answers = [checked_answer(value, key) for value, key in zip(values, keys, strict=True)]
    whole = [turns for turns in answers if not isinstance(turns, str) and turns[0]["role"] != "assistant"]
    if isinstance(prompt, str) and whole:
        shared = shared_messages(whole)
        if any(message["content"] == prompt for message in shared):
            prompt = shared
    return prompt, [_after(prompt, turns, key) for turns, key in zip(answers, keys, strict=True)]


def shared_messages(dialogues: Sequence[list[Message]]) -> list[Message]:
    """Longest common prefix of dialogues after which each continues with the assistant's turn; may be empty."""
    longest = min(map(len, dialogues)) - 1
    same = next((n for n in range(longest) if any(d[n] != dialogues[0][n] for d in dialogues)), longest)
    turns = (n for n in range(same, 0, -1) if all(d[n]["role"] == "assistant" for d in dialogues))
    return dialogues[0][: next(turns, 0)]


def shared_text(chosen: str, rejected: str) -> str:
    r"""Prompt of two dialogues in plain text; may be empty.

    Up to the last `\n\nAssistant:` that both have in common (Bai et al. 2022), for their answers may begin alike;
    without one, the longest common beginning, its last space left to the responses (TRL's `extract_prompt`).
    """
    common = commonprefix([chosen, rejected])
    before, marker, _ = common.rpartition(_ASSISTANT)
    return before + marker if marker else common.removesuffix(" ")


def _after(prompt: Prompt, turns: Answer, key: str) -> Answer:
    if isinstance(turns, str):
        return turns
    dialogue = as_dialogue(prompt)
    rest = turns[len(dialogue) :] if turns[: len(dialogue)] == dialogue else turns
    if not rest or rest[0]["role"] != "assistant":
        raise ValueError(
            f"`{key}` has {len(turns) - 1} messages before its last that are not the prompt and would be lost: "
            "move them into the prompt"
        )
    return rest


PROMPT_KEYS = ("input", "context_messages")
"""OpenRLHF's names of the prompt."""
ANSWER_KEYS = ("completion", "output", "messages")
"""TRL's and OpenRLHF's names of the answer; `messages` is the whole dialogue."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """Prompt with the answer to imitate."""

    prompt: Prompt
    response: Answer


def prompt_of(row: Row, columns: ColumnNames) -> Prompt:
    """Return the prompt to respond to, of any row that has one.

    It is the value of `prompt_key`, or else the beginning of a dialogue (`messages`), of a pair (`chosen`, `rejected`)
    or of ranked `completions` (`context`).

    Raises:
        ValueError: there is none, there are several, or it is neither a text nor messages.
    """
    key = prompt_key(row, columns)
    if key is not None:
        return checked_prompt(value_of(row, key, "prompt"), key)
    dialogue = "messages" in row
    pair = columns.chosen in row and columns.rejected in row
    ranked = "completions" in row
    one_of({"messages": dialogue, columns.chosen: pair, "completions": ranked}, "the prompt", "prompt")
    if dialogue:
        messages = checked_messages(row["messages"], "messages")
        return _before_answer(messages, "messages") if messages[-1]["role"] == "assistant" else messages
    if pair:
        return split_pair(row, columns)[0]
    if ranked and "context" in row:
        return checked_prompt(row["context"], "context")
    return checked_prompt(value_of(row, columns.prompt, "prompt"), columns.prompt)  # which it is not: say so


def prompt_key(row: Row, columns: ColumnNames) -> str | None:
    """Return the key of the row's prompt; returns None if it has to be found in a dialogue.

    Raises:
        ValueError: several might.
    """
    if columns.prompt in row or columns.prompt != ColumnNames.prompt:  # a key that was named on purpose must be there
        return columns.prompt
    present = {key: key in row for key in PROMPT_KEYS}
    beside = {"instruction": "instruction" in row and any(present.values())}  # Alpaca's: `input` is half of its prompt
    return one_of(present | beside, "the prompt", "prompt")


def text_of(row: Row, columns: ColumnNames) -> str:
    """Return the document of `{"text"}`.

    Raises:
        ValueError: the key is missing or is no text.
    """
    text = value_of(row, columns.text, "text")
    if not isinstance(text, str):
        raise ValueError(f"`{columns.text}` must be a text, found {type(text).__name__}: {str(text)[:80]}")
    return text


def is_document(row: Row, columns: ColumnNames) -> bool:
    """Return True if a row of demonstrations has a text and no prompt or answer (TRL's language modeling)."""
    named = {columns.prompt, columns.response, *PROMPT_KEYS, *ANSWER_KEYS}
    return columns.text in row and not named & row.keys()


def demonstration_of(row: Row, columns: ColumnNames) -> Demonstration:
    """Return the demonstration of a prompt and its answer, or of a dialogue that ends with one.

    Raises:
        ValueError: a key is missing or has another type, several might be meant, or `label` calls the answer bad.
    """
    prompted, key = prompt_key(row, columns), _answer_key(row, columns)
    if prompted is None and key == "messages":
        messages = checked_answer(value_of(row, key, "response"), key)
        prompt = _before_answer(messages, key) if isinstance(messages, list) else ""
    else:
        prompt = checked_prompt(value_of(row, prompted or columns.prompt, "prompt"), prompted or columns.prompt)
        messages = value_of(row, key, "response")
    if key == "completion" and str(row.get("label")).lower() in ("false", "0"):  # texts in CSV
        raise ValueError("`label` is false: the `completion` is a bad one, not to be imitated; leave out such rows")
    prompt, (answer,) = answered(prompt, [messages], [key])
    return Demonstration(prompt, answer)


def label_of(row: Row, columns: ColumnNames) -> bool:
    """Return True if a row's label calls its response good.

    Labels are true, false, 1 or 0, which may be texts as CSV holds them.

    Raises:
        ValueError: it is missing or something else.
    """
    value = value_of(row, columns.label, "label")
    good = {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if good is None:
        raise ValueError(
            f"`{columns.label}` must be true for a good response or false for a bad one, found {str(value)[:80]!r}; "
            "where it holds something else, point `columns.label` at another key"
        )
    return good


def split_pair(row: Row, columns: ColumnNames) -> tuple[Prompt, Any, Any]:
    """Return the implicit prompt of two dialogues and the rest of each.

    Raises:
        ValueError: they have nothing in common that could be a prompt.
    """
    chosen, rejected = (value_of(row, getattr(columns, side), side) for side in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = shared_text(chosen, rejected)
        if not prompt:
            raise ValueError(
                f"no key `{columns.prompt}`, and `{columns.chosen}` and `{columns.rejected}` have no common beginning "
                f"to take as the prompt; found {chosen[:40]!r} and {rejected[:40]!r}: add the prompt, or name its key "
                "with `columns.prompt`"
            )
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    dialogues = [checked_messages(chosen, columns.chosen), checked_messages(rejected, columns.rejected)]
    shared = shared_messages(dialogues)
    if not shared:
        raise ValueError(
            f"no key `{columns.prompt}`, and `{columns.chosen}` and `{columns.rejected}` are not one dialogue with two "
            "endings: their first messages must be equal, and an assistant's turn follow in both; add the prompt"
        )
    first, second = (dialogue[len(shared) :] for dialogue in dialogues)
    return checked_prompt(shared, columns.chosen), first, second


def value_of(row: Row, key: str, column: str) -> Any:
    """Return the value of a key.

    Raises:
        ValueError: the row does not have it.
    """
    if key not in row:
        raise ValueError(
            f"no key `{key}`; found {sorted(row)}: add it, or name the key to read instead with `columns.{column}`"
        )
    return row[key]


def one_of(found: dict[str, bool], what: str, column: str) -> str | None:
    """Return the one key that is present; returns None if there is none.

    Raises:
        ValueError: there are several.
    """
    keys = [key for key, there in found.items() if there]
    if len(keys) > 1:
        raise ValueError(
            f"{what} could be in {' or '.join(f'`{key}`' for key in keys)}: say which is meant with "
            f"`columns.{column}`, or remove the others"
        )
    return keys[0] if keys else None


def _answer_key(row: Row, columns: ColumnNames) -> str:
    if columns.response in row or columns.response != ColumnNames.response:
        return columns.response
    return one_of({key: key in row for key in ANSWER_KEYS}, "the answer", "response") or columns.response


def _before_answer(messages: list[Any], key: str) -> Prompt:
    shared = shared_messages([messages])
    if not shared:
        raise ValueError(f"`{key}` holds nothing before the assistant's message: there is no prompt to answer")
    return checked_prompt(shared, key)
