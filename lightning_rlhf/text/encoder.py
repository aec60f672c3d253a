"""Encoder of text and dialogues as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from os.path import expanduser
from typing import Any, NamedTuple, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_rlhf.folders.inspection import check_tokenizer, loading
from lightning_rlhf.folders.location import local_folder
from lightning_rlhf.text.characters import check_characters
from lightning_rlhf.text.ends import end_tokens, turn_end
from lightning_rlhf.text.messages import Message, Prompt, as_dialogue, extras
from lightning_rlhf.text.template import ChatTemplate, doubled

Tokens: TypeAlias = "array[int]"
"""Token ids as 32-bit integers: a tenth of a list's memory, and cheap to hand to loader workers."""

LONG_TEXT = 2**20
"""Characters of a long text. It is tokenized only if a limit allows for it: each takes hundreds of bytes of memory."""
_WIDE_TOKEN = 64
"""Number of characters of a wide token."""


def load_tokenizer(source: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or hub name without remote code; returns a built one unchanged.

    Raises:
        ValueError: there is no such folder, or it holds no tokenizer that can be loaded.
    """
    if not isinstance(source, str):
        return source
    source = expanduser(source)
    folder = local_folder(source)
    if folder is not None:
        check_tokenizer(folder)
    with loading("a tokenizer", source):
        return AutoTokenizer.from_pretrained(source, local_files_only=folder is not None, trust_remote_code=False)


class Exchange(NamedTuple):
    """Token ids of a prompt and of the response to it.

    Attributes:
        prompt: token ids, at least one.
        response: token ids, the last of them the end token.
        mended: whether an opening tag that both had was left out of the response.
    """

    prompt: Tokens
    response: Tokens
    mended: bool


class Encoder:
    """Encoder of prompts, responses and documents as token ids.

    Args:
        tokenizer: needs an end token; a prompt of messages also needs its chat template.
        prompt_role: role under which a text prompt becomes a message; None leaves it plain text.
        chat_template_kwargs: arguments of the chat template for every dialogue.

    Attributes:
        end: id of the token that ends a text.
        turn_end: id of the token that ends the answer to a dialogue: the one the chat template writes after a turn,
            or `end` where it writes none.
        pad: id that fills batches: the pad token, or the end token where there is none (masks come from lengths).

    Raises:
        ValueError: the tokenizer has no end token, or text means nothing to it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_role: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no response could ever end: set one, "
                "for example tokenizer.eos_token = '</s>', and save the tokenizer again"
            )
        self.tokenizer = tokenizer
        self.prompt_role = prompt_role
        self.template = ChatTemplate(tokenizer, chat_template_kwargs)
        self._recent: tuple[str, bool, Tokens] | None = None
        self.end: int = tokenizer.eos_token_id
        turn = turn_end(tokenizer)
        self.turn_end: int = self.end if turn is None else turn
        self._any_end = set(end_tokens(tokenizer))
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Some tokenizers end every text too: a prompt would be over before its response.
        self._closes = self._ends("a", special=True) and not self._ends("a", special=False)

    def exceeds(self, limit: int, *parts: Prompt) -> bool:
        """Return True if texts or dialogues are together far over a limit of tokens, without tokenizing them.

        They exceed it if they have more than `LONG_TEXT` characters and more than `limit` tokens as wide as the widest
        of the vocabulary, or as 64 characters, would hold.

        Args:
            limit: tokens.
            parts: texts or messages.

        Returns:
            False where tokens have to be counted.
        """
        values = [value for part in parts for message in as_dialogue(part) for value in message.values()]
        characters = sum(len(value) for value in values if isinstance(value, str))
        return characters > LONG_TEXT and characters > limit * max(_WIDE_TOKEN, *map(len, self.tokenizer.get_vocab()))

    def prompt(self, prompt: Prompt, arguments: Mapping[str, Any] | None = None) -> Tokens:
        """Encode a prompt up to the start of the response.

        A text with the tokenizer's opening tokens; a dialogue through the chat template, which writes its own.

        Args:
            prompt: a text or messages.
            arguments: those of the row for the chat template, such as `tools`.

        Returns:
            token ids, at least one.

        Raises:
            ValueError: no token is left to answer, there is no chat template for messages, or it would leave out
                part of them.
        """
        messages = self._dialogue(prompt, arguments)
        if messages is None:
            return self._asked(str(prompt), templated=False)
        return self._asked(self.template.prompt(messages, arguments or {}), templated=True)

    def exchange(
        self, prompt: Prompt, answer: str | list[Message], arguments: Mapping[str, Any] | None = None
    ) -> Exchange:
        """Encode a prompt and the response to learn.

        Args:
            prompt: a text or messages.
            answer: a text, which is the response as it stands; or messages, whose last is the response as the chat
                template writes it, and whose others belong to the prompt.
            arguments: those of the row for the chat template, such as `tools`.

        Returns:
            both as tokens; an opening tag that both the prompt ends in and the response begins with stands once.

        Raises:
            ValueError: as `prompt`, or the template would leave out part of the answer.
        """
        if isinstance(answer, list) and len(answer) > 1:
            prompt, answer = [*as_dialogue(prompt), *answer[:-1]], answer[-1:]
        messages = self._dialogue(prompt, arguments)
        if messages is None:
            return Exchange(self.prompt(prompt), self.response(_untemplated(answer)), mended=False)
        opened = self.template.prompt(messages, arguments or {})
        text = answer if isinstance(answer, str) else self.template.turn(messages, answer[0], opened, arguments or {})
        once = doubled(opened, text)
        tokens = self._asked(opened, templated=True)
        return Exchange(tokens, self.response(text if once is None else once, messages), mended=once is not None)

    def response(self, text: str, prompt: Prompt = "") -> Tokens:
        """Encode a text as a rollout would yield it: no opening tokens and one end token.

        Args:
            text: without opening tokens; an end token that it ends with stays, or becomes that of a turn.
            prompt: what it answers: after a dialogue it ends as the chat template ends a turn.

        Returns:
            token ids, at least one.
        """
        tokens = self._encode(text, special=False)
        if self.end_after(prompt) == self.end:
            return tokens if tokens and tokens[-1] in self._any_end else self._ended(tokens)
        while tokens and tokens[-1] in self._any_end:
            tokens.pop()
        tokens.append(self.turn_end)
        return tokens

    def end_after(self, prompt: Prompt) -> int:
        """Id of the end token that a response to this prompt is taught."""
        return self.end if self.prompt_role is None and isinstance(prompt, str) else self.turn_end

    def inside(self, text: str) -> Tokens:
        """Encode a text that stands inside a dialogue, without opening and end tokens."""
        return self._encode(text, special=False)

    def document(self, text: str) -> Tokens:
        """Encode a pretraining document with the tokenizer's opening tokens and one end token."""
        return self._ended(self._opened(text))

    def _dialogue(self, prompt: Prompt, arguments: Mapping[str, Any] | None) -> list[Message] | None:
        """Return the messages for the template; returns None if the prompt is plain text."""
        if self.prompt_role is not None or not isinstance(prompt, str):
            return as_dialogue(prompt, self.prompt_role or "user")
        lost = [*(arguments or {}), *self.template.arguments]
        if lost:
            raise ValueError(
                f"the prompt is plain text, which no chat template writes, so `{lost[0]}` would be lost: give messages "
                "or `prompt_role`, or remove it; a column that is meant otherwise is left alone where `columns.tools` "
                "or `columns.chat_template_kwargs` name another"
            )
        return None

    def _asked(self, text: str, *, templated: bool) -> Tokens:
        """Encode a prompt and cache the last one, because a row may have several answers to it."""
        if self._recent is None or self._recent[:2] != (text, templated):
            tokens = self._encode(text, special=False) if templated else self._opened(text)
            if not tokens:
                raise ValueError(f"the prompt {text!r} has no tokens: nothing to respond to; remove the row")
            self._recent = (text, templated, tokens)
        return self._recent[2]

    def _opened(self, text: str) -> Tokens:
        begin = self.tokenizer.bos_token
        special = not (begin and text.startswith(begin))  # a text that brings its own opening token gets no second
        tokens = self._encode(text, special=special)
        if special and self._closes:
            tokens.pop()
        return tokens

    def _ended(self, tokens: Tokens) -> Tokens:
        if not tokens or tokens[-1] != self.end:
            tokens.append(self.end)
        return tokens

    def _ends(self, text: str, *, special: bool) -> bool:
        return self._encode(text, special=special)[-1:].tolist() == [self.end]

    def _encode(self, text: str, *, special: bool) -> Tokens:
        check_characters(text)
        return array("i", self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _untemplated(answer: str | list[Message]) -> str:
    if isinstance(answer, str):
        return answer
    (message,) = answer
    if extras(message):
        raise ValueError(
            f"the answer has `{extras(message)[0]}`, which only a chat template can write, but the prompt is plain "
            "text: give the prompt as messages, or `prompt_role`, or the answer as a text"
        )
    return str(message["content"])
