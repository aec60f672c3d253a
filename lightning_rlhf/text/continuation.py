"""Token ids between two turns of a dialogue, as the chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.text.encoder import Encoder, Tokens
from lightning_rlhf.text.messages import Message, Prompt, as_dialogue

_PROBE = "qzxq"
"""Message content that is easy to find in the text of a template."""


class Continuation:
    """Encoder of what stands between two answers whose token ids are kept.

    Args:
        encoder: of prompts.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def opening(self, prompt: Prompt, observed: str | Sequence[Message], arguments: Mapping[str, Any]) -> Tokens:
        """Encode a prompt with what an environment adds to it, up to the start of the first answer.

        Args:
            prompt: a text or messages.
            observed: messages after it, or a text that its last message goes on with.
            arguments: of the row for the chat template, such as `tools`.

        Raises:
            ValueError: as of `Encoder.prompt`.
        """
        if not observed:
            return self.encoder.prompt(prompt, arguments)
        if self._is_text(prompt):
            added = observed if isinstance(observed, str) else _joined(observed)
            return self.encoder.prompt(str(prompt) + added, arguments)
        return self.encoder.prompt(self.opened(prompt, observed), arguments)

    def opened(self, prompt: Prompt, observed: str | Sequence[Message]) -> list[Message]:
        """Return the messages of a prompt with what an environment adds to it; none if it is plain text.

        Args:
            prompt: a text or messages.
            observed: messages after it, or a text: the user's message that the prompt ends with goes on with it, since
                many templates take no two of a user's in a row.
        """
        before = self.dialogue(prompt)
        if not before or not isinstance(observed, str):
            return [*before, *observed] if before else []
        last = before[-1]
        if last["role"] != "user":
            return [*before, *([{"role": "user", "content": observed}] if observed else [])]
        return [*before[:-1], last | {"content": str(last["content"]) + observed}]

    def between(
        self,
        dialogue: Sequence[Message],
        answer: str,
        reply: Sequence[Message],
        arguments: Mapping[str, Any],
        last: int,
    ) -> Tokens:
        """Encode what follows an answer, up to the start of the next.

        Args:
            dialogue: messages that the answer answers; empty for plain text.
            answer: its text.
            reply: messages after it, at least one.
            arguments: of the row for the chat template.
            last: id of the answer's last token, the end of the turn if it has one.

        Raises:
            ValueError: the template takes no such messages, or it would write the answer otherwise once others follow.
        """
        if not dialogue:
            return self.encoder.inside(_joined(reply))
        template = self.encoder.template
        whole = template.prompt([*dialogue, {"role": "assistant", "content": answer}, *reply], arguments)
        if answer.strip() not in whole:
            raise ValueError(
                f"the chat template leaves out part of the policy's turn {answer[:60]!r} once a message follows, as "
                "some do with earlier reasoning: the policy would learn from another text than the template writes; "
                "take a template that keeps earlier turns, or an environment whose messages have the role 'tool'"
            )
        probe = _PROBE
        while probe in whole:
            probe += _PROBE[-1]
        probed = template.prompt([*dialogue, {"role": "assistant", "content": probe}, *reply], arguments)
        tail = probed.rpartition(probe)[2]
        ended_by = str(self.encoder.tokenizer.convert_ids_to_tokens(last))
        return self.encoder.inside(tail.removeprefix(ended_by))

    def dialogue(self, prompt: Prompt) -> list[Message]:
        """Return a prompt as messages; none if it is plain text, which no template writes."""
        return [] if self._is_text(prompt) else list(as_dialogue(prompt, self.encoder.prompt_role or "user"))

    def _is_text(self, prompt: Prompt) -> bool:
        return isinstance(prompt, str) and self.encoder.prompt_role is None


def _joined(messages: Sequence[Message]) -> str:
    return "".join(str(message["content"]) for message in messages)
