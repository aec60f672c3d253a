"""Column names of a JSONL file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ColumnNames:
    """Names of the keys of a record, so that a file can be read without being rewritten.

    Args:
        prompt: the prompt, a text or a list of messages.
        response: the answer of a demonstration, a text or messages that end with the assistant's.
        chosen: the preferred response of a pair.
        rejected: the other response of a pair.
        margin: by how much the labeler found the preferred response of a pair better, a number of at least 0; optional.
        responses: K responses to one prompt.
        scores: one number per response, higher is better.
        ranks: one number per response, lower is better.
        systems: one name per response, of who wrote it; optional. Held-out accuracy is also given by name.
        text: a pretraining document.
        tools: schemas of the tools that the chat template writes into a dialogue; optional.
        chat_template_kwargs: other arguments of the chat template by name; optional.
    """

    prompt: str = "prompt"
    response: str = "response"
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str = "margin"
    responses: str = "responses"
    scores: str = "scores"
    ranks: str = "ranks"
    systems: str = "systems"
    text: str = "text"
    tools: str = "tools"
    chat_template_kwargs: str = "chat_template_kwargs"
