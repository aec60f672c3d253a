"""Name of a dataset on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAMED = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<split>\w[\w.+%:\[\]-]*)")


@dataclass(frozen=True, kw_only=True)
class HubData:
    """One split of a dataset for `datasets.load_dataset`, the only source of rows that may use the network.

    Args:
        path: OWNER/NAME on the hub, or a folder that holds a copy of such a dataset.
        split: which part, such as `train`, `train_sft` or `train[:1000]`.
        name: its configuration, where it has several.
    """

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        """Format as `OWNER/NAME:SPLIT` for errors, with `/CONFIGURATION` if there is one."""
        return f"{self.path}{f'/{self.name}' if self.name else ''}:{self.split}"


def hub_data(source: str) -> HubData | None:
    """Parse `OWNER/NAME:SPLIT`; returns None if `source` is a path.

    A source is a path if it has another form, if it exists or if OWNER is a local folder. Otherwise a misspelt path
    would ask the network.
    """
    match = _NAMED.fullmatch(source)
    if match is None or Path(source).exists() or Path(match["path"]).parent.is_dir():
        return None
    return HubData(path=match["path"], split=match["split"])
