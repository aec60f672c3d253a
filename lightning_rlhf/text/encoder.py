"""Text and dialogues as token ids."""

from __future__ import annotations

from array import array
from typing import TypeAlias, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lightning_rlhf.folders.inspection import check_tokenizer, loading
from lightning_rlhf.folders.location import local_folder
from lightning_rlhf.text.messages import Message, Prompt, as_dialogue

Tokens: TypeAlias = "array[int]"
"""Token ids as 32-bit integers: a tenth of a list's memory, and cheap to hand to loader workers."""


def load_tokenizer(source: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one in a folder or under a hub name; remote code is never run.

    Raises:
        ValueError: there is no such folder, or it holds no tokenizer that can be loaded.
    """
    if not isinstance(source, str):
        return source
    folder = local_folder(source)
    if folder is not None:
        check_tokenizer(folder)
    with loading("a tokenizer", source):
        return AutoTokenizer.from_pretrained(source, local_files_only=folder is not None, trust_remote_code=False)


class Encoder:
    """Token ids of prompts, responses and documents.

    Args:
        tokenizer: needs an end token; a prompt of messages also needs its chat template.
        prompt_role: role under which a text prompt becomes a message; None leaves it plain text.

    Attributes:
        end: id of the end token.
        pad: id that fills batches: the pad token, or the end token where there is none (masks come from lengths).

    Raises:
        ValueError: the tokenizer has no end token, or text means nothing to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prompt_role: str | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no end token, so no response could ever end: set one, "
                "for example tokenizer.eos_token = '</s>', and save the tokenizer again"
            )
        self.tokenizer = tokenizer
        self.prompt_role = prompt_role
        self.end: int = tokenizer.eos_token_id
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # Some tokenizers end every text too: a prompt would be over before its response.
        self._closes = self._ends("a", special=True) and not self._ends("a", special=False)

    def prompt(self, prompt: Prompt) -> Tokens:
        """The prompt up to where the response begins.

        A text with the tokenizer's opening tokens; a dialogue through the chat template, which writes its own.

        Args:
            prompt: a text or messages.

        Returns:
            token ids, at least one.

        Raises:
            ValueError: no token is left to answer, or there is no chat template for messages.
        """
        if self.prompt_role is not None or not isinstance(prompt, str):
            tokens = self._encode(self._templated(as_dialogue(prompt, self.prompt_role or "user")), special=False)
        else:
            tokens = self._opened(prompt)
        if not tokens:
            raise ValueError(f"the prompt {prompt!r} has no tokens: nothing to respond to; remove the row")
        return tokens

    def response(self, text: str) -> Tokens:
        """What a rollout would yield: the text without opening tokens, then one end token."""
        return self._ended(self._encode(text, special=False))

    def document(self, text: str) -> Tokens:
        """A pretraining document with the tokenizer's opening tokens, then one end token."""
        return self._ended(self._opened(text))

    def _templated(self, messages: list[Message]) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the prompt is a dialogue, but the tokenizer {self.tokenizer.name_or_path!r} has no chat template: "
                "set tokenizer.chat_template, use the tokenizer of a chat model, or give prompts as plain text with "
                "`prompt_role` null"
            )
        try:
            found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program that came with the tokenizer: it may raise anything
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not take these messages ({error}): change "
                "their roles or their order, or the template"
            ) from error
        return cast(str, found)

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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half of a surrogate pair, {text[error.start]!r}, at character {error.start}: it was "
                "cut inside a character; remove it"
            ) from error
        return array("i", self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
