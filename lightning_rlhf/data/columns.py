"""Column names of a JSONL file, with the arguments of the chat template in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.types import Row


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
        label: true for a good response, false for a bad one; of labeled responses alone.
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
    label: str = "label"
    text: str = "text"
    tools: str = "tools"
    chat_template_kwargs: str = "chat_template_kwargs"


def template_arguments(row: Row, columns: ColumnNames) -> dict[str, Any]:
    """Collect the tools and template arguments of a row by name, without empty ones.

    Either may be JSON in a text, as flat tables hold them.

    Raises:
        ValueError: `tools` are no list of schemas, or the others no mapping.
    """
    tools = _loaded(row.get(columns.tools))
    named = _loaded(row.get(columns.chat_template_kwargs))
    if not isinstance(tools or [], list) or not all(isinstance(tool, Mapping) for tool in tools or []):
        raise ValueError(_needed(columns.tools, "a list of JSON schemas", tools, "columns.tools"))
    if not isinstance(named or {}, Mapping) or "tools" in (named or {}):
        needed = "a mapping of arguments, `tools` in a column of their own"
        raise ValueError(_needed(columns.chat_template_kwargs, needed, named, "columns.chat_template_kwargs"))
    return {**(named or {}), **({"tools": tools} if tools else {})}


def _loaded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except json.JSONDecodeError:
        return value  # a text, which is refused


def _needed(key: str, needed: str, found: Any, column: str) -> str:
    return (
        f"`{key}` must be {needed} for the chat template, found {type(found).__name__}: {str(found)[:80]}; where it "
        f"holds something else, point `{column}` at another key"
    )
