"""Arguments of the chat template in a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.types import Row


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
