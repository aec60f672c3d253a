"""Tool calls in the text of a turn, in the form that a chat template writes them."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.environments.environment import ToolCall

_NAME, _KEY, _VALUE = "qzxq_tool", "qzxq_key", "qzxq_value"
"""Name and argument of a call that are easy to find in the text of a template."""
_QUESTION: dict[str, Any] = {"role": "user", "content": "a"}
NEEDED = 'a tool call must have the form {"name": ..., "arguments": {...}}'
_TAGS = ("<tool_call>", "</tool_call>")
"""Around a call where the template writes none: those of Hermes, which most models follow."""


class CallFormat(NamedTuple):
    """How calls are written: JSON objects between two texts.

    Attributes:
        before: text before a call; empty if the call is all of the turn.
        after: text after it.
    """

    before: str
    after: str

    def parse(self, text: str) -> list[ToolCall]:
        """Return the calls in a text, those that are malformed with what is wrong."""
        calls: list[ToolCall] = []
        for body in self._bodies(text):
            try:
                found = json.loads(body)
            except (json.JSONDecodeError, RecursionError) as error:
                calls.append(ToolCall("", {}, f"{NEEDED}: it is no JSON, {error}"))
                continue
            calls += [_as_call(one) for one in (found if isinstance(found, list) else [found])]
        return calls

    def _bodies(self, text: str) -> list[str]:
        if not self.before:
            whole = text.strip()
            return [whole] if whole.startswith("{") and '"name"' in whole else []
        start, stop = re.escape(self.before), re.escape(self.after) if self.after else r"\Z"
        return [match.strip() for match in re.findall(rf"(?s){start}(.*?)(?:{stop}|\Z)", text)]


def _as_call(found: Any) -> ToolCall:
    """Return a call, or a malformed one with what is wrong with it."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return ToolCall("", {}, f"{NEEDED}: there is no name")
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            return ToolCall(found["name"], {}, f"{NEEDED}: the arguments are no JSON, {error}")
    if not isinstance(arguments, dict):
        return ToolCall(found["name"], {}, f"{NEEDED}: the arguments are no object")
    return ToolCall(found["name"], arguments)


def call_format(tokenizer: PreTrainedTokenizerBase) -> CallFormat:
    """Return how the tokenizer's chat template writes a call; Hermes' tags where it writes none, or no JSON."""
    written = _rendered(tokenizer)
    if written is None or _NAME not in written:
        return CallFormat(*_TAGS)
    start, stop = _enclosing(written)
    if start < 0:
        return CallFormat(*_TAGS)
    opening = re.search(r"(<[^<>\n]+>|\[[A-Z_]+\])\s*\[?\s*\Z", written[:start])
    closing = re.match(r"\s*\]?\s*(</[^<>\n]+>)", written[stop:])
    before, after = ("" if match is None else match[1] for match in (opening, closing))
    if opening is not None and closing is None and before in _role_marks(tokenizer):
        return CallFormat("", "")
    return CallFormat(before, after)


def _enclosing(written: str) -> tuple[int, int]:
    """Return where the JSON object with the probe's name begins and ends; −1 if there is none."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", written):
        try:
            found, stop = decoder.raw_decode(written, match.start())
        except json.JSONDecodeError:
            continue
        if _as_call(found).name == _NAME:
            return match.start(), stop
    return -1, -1


def _role_marks(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts that the template writes before any answer, which are no marks of a call."""
    plain = tokenizer.apply_chat_template([_QUESTION], tokenize=False, add_generation_prompt=True)
    return set(re.findall(r"<[^<>\n]+>", str(plain)))


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what the template writes of a turn with a call; None if it takes none."""
    if tokenizer.chat_template is None:
        return None
    function = {"name": _NAME, "arguments": {_KEY: _VALUE}}
    call = {"type": "function", "id": "qzxqcall0", "function": function}
    dialogue: list[Any] = [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        return str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    except Exception:  # a template is a program that came with the tokenizer: it may raise anything
        return None
