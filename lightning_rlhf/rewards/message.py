"""Template of a message to a chat model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_FIELD = re.compile(r"\{(\w+)\}")


class MessageTemplate:
    """Text in which `{name}` stands for a value; other braces stand for themselves.

    Args:
        text: the template.
        own: names that its user fills; all others are columns of the rows.
        needs: names of `own` without which it makes no sense.

    Raises:
        ValueError: one that it needs is missing.

    Attributes:
        columns: names of the columns it reads.
    """

    def __init__(self, text: str, *, own: Sequence[str], needs: Sequence[str]) -> None:
        names = list(dict.fromkeys(_FIELD.findall(text)))
        missing = [f"{{{name}}}" for name in needs if name not in names]
        if missing:
            raise ValueError(f"`template` must hold {' and '.join(missing)}: got {text[:80]!r}")
        self.text = text
        self.columns = [name for name in names if name not in own]

    def check_columns(self, names: set[str]) -> None:
        """Raise ValueError if it reads a column that the data lack.

        Args:
            names: columns of the records.
        """
        missing = [f"{{{name}}}" for name in self.columns if name not in names - {"prompts", "responses"}]
        if missing:
            raise ValueError(
                f"`template` reads {', '.join(missing)}, but the rows have {', '.join(sorted(names)) or 'none'}: "
                "rename the column, or take it out of the template"
            )

    def filled(self, values: Mapping[str, Any]) -> str:
        """Return the message; braces inside a value stand for themselves."""
        return _FIELD.sub(lambda match: written(values[match[1]]), self.text)


def written(value: Any) -> str:
    """Return a cell as text; of messages the contents, each with its role where there are several."""
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) and "content" in turn for turn in value):
        return str(value)
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n\n".join(f"{turn.get('role', 'user')}: {turn['content']}" for turn in value)
