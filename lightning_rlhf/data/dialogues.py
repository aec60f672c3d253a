"""Splitting of a dialogue into prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, TypeAlias

from lightning_rlhf.text import Message, Prompt, as_dialogue, checked_answer

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
