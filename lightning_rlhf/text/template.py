"""Rendering of dialogues by the tokenizer's chat template: prompts, and the turn that answers one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.text.messages import Message, extras

_PROBE = "qzxq"
"""Message content that is easy to find in the text of a template."""
_TAG = re.compile(r"<\w+>\s*\Z")
"""Pattern of an opening tag at the end of a prompt, such as `<think>`."""
_LABELS = ("name", "tool_call_id")
"""Keys of a message without content of their own, which a template may leave out."""
_OWN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"documents", "kwargs"}
"""Arguments of `apply_chat_template` that a row must not set."""


class ChatTemplate:
    """Renderer of a tokenizer's chat template, with additional arguments.

    Args:
        tokenizer: needs a chat template once a dialogue comes.
        arguments: what the template is given with every dialogue, such as `enable_thinking`; a row's own come first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._ends: set[str] = set()

    def prompt(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
        """Render the dialogue up to the start of the answer.

        Args:
            messages: at least one.
            arguments: those of the row.

        Returns:
            what is given before the response.

        Raises:
            ValueError: there is no template, it doesn't take these messages, or it would leave out part of them.
        """
        for number in range(len(messages)):
            self._check_written(messages, number, arguments)
        return self._written(messages, arguments, prompt=True)

    def turn(self, messages: Sequence[Message], answer: Message, prompt: str, arguments: Mapping[str, Any]) -> str:
        """Render the answer after the prompt with tool calls and reasoning, without its end.

        If the template writes only the content and an end, this is the unchanged content.

        Args:
            messages: what is answered.
            answer: a message of the assistant's.
            prompt: what `prompt` gives for `messages`.
            arguments: those of the row.

        Returns:
            what a response would be.

        Raises:
            ValueError: the prompt isn't how the dialogue begins, or part of the answer would be left out.
        """
        dialogue, content = [*messages, answer], str(answer["content"])
        self._check_written(dialogue, len(messages), arguments, answer=True)
        whole = self._written(dialogue, arguments)
        start = prompt if whole.startswith(prompt) else prompt.rstrip()
        if not whole.startswith(start):
            if not extras(answer) and doubled(prompt, content):
                return content
            raise ValueError(
                f"the chat template ends the prompt with {prompt[-40:]!r}, which the dialogue with its answer doesn't "
                "have at that place, so the answer would follow what it never follows: give the answer as a text, "
                "with all that comes after the prompt, or change the template or its arguments"
            )
        written = whole[len(start) :]
        if written.startswith(content) and written[len(content) :] in self._ends:
            return content
        end = self._end(messages, arguments)
        if not written.endswith(end):
            raise ValueError(
                f"the chat template ends this answer with {written[-40:]!r} and others with {end!r}, so where the "
                "response ends is unknown: give the answer as a text, as the template writes it"
            )
        body = written.removesuffix(end)
        return content if body.strip() == content.strip() else body

    def _end(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> str:
        """Return the text that the template writes after a content."""
        probed = self._written([*messages, {"role": "assistant", "content": _PROBE}], arguments)
        end = probed.rpartition(_PROBE)[2]
        self._ends.add(end)
        return end

    def _check_written(
        self, messages: Sequence[Message], number: int, arguments: Mapping[str, Any], *, answer: bool = False
    ) -> None:
        """Raise if a key is not written, unless a template that names it leaves it out of an earlier turn."""
        message = messages[number]
        for key in extras(message):
            if key in _LABELS or (not answer and self._names(key, arguments)):
                continue
            without = {name: value for name, value in message.items() if name != key}
            others = [*messages[:number], without, *messages[number + 1 :]]
            if self._written(messages, arguments) == self._written(others, arguments):
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path!r} does not write `{key}` of message {number} "
                    f"({message['role']!r}), so it would be lost: remove the key, or take a template that writes it"
                )

    def _names(self, word: str, arguments: Mapping[str, Any]) -> bool:
        template = self.tokenizer.get_chat_template(tools=arguments.get("tools"))
        return re.search(rf"\b{re.escape(word)}\b", template) is not None

    def _written(self, messages: Sequence[Message], arguments: Mapping[str, Any], *, prompt: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the prompt is a dialogue, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template: "
                "set tokenizer.chat_template, use the tokenizer of a chat model, or give prompts as plain text with "
                "`prompt_role` null"
            )
        arguments = self.arguments | dict(arguments)
        for name in arguments:
            if name in _OWN - {"tools"} or not self._names(name, arguments):
                raise ValueError(
                    f"the chat template of {self.tokenizer.name_or_path!r} takes no `{name}`, so it would be lost: "
                    "remove it, or take a template that uses it; a column that is meant otherwise is left alone where "
                    "`columns.tools` or `columns.chat_template_kwargs` name another"
                )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=prompt, tokenize=False, **arguments
            )
        except Exception as error:  # a template is a program that came with the tokenizer: it may raise anything
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not take these messages ({error}): change "
                "their roles or their order, or the template"
            ) from error
        return cast(str, text)


def doubled(prompt: str, response: str) -> str | None:
    """Remove an opening tag from the response that also ends the prompt; returns None if there is none."""
    opening = _TAG.search(prompt)
    if opening is None or not response.lstrip().startswith(opening[0].rstrip()):
        return None
    rest = response.lstrip().removeprefix(opening[0].rstrip())
    return rest if opening[0] == opening[0].rstrip() else rest.lstrip()
