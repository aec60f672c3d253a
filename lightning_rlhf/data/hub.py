"""A dataset by its name on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_NAMED = re.compile(r"(?P<path>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*):(?P<split>\w[\w.+%:\[\]-]*)")


@dataclass(frozen=True, kw_only=True)
class HubData:
    """One split of a dataset, as `datasets.load_dataset` finds it: the only source of rows that may ask the network.

    Args:
        path: OWNER/NAME on the hub, or a folder that holds a copy of such a dataset.
        split: which part, such as `train`, `train_sft` or `train[:1000]`.
        name: its configuration, where it has several.
    """

    path: str
    split: str
    name: str | None = None

    def __str__(self) -> str:
        """`OWNER/NAME:SPLIT`, with `/CONFIGURATION` where one is named: how errors call it."""
        return f"{self.path}{f'/{self.name}' if self.name else ''}:{self.split}"


def hub_data(source: str) -> HubData | None:
    """What `OWNER/NAME:SPLIT` names, or None if `source` is a path.

    It is one where it has another form, where it exists, and where OWNER is a folder here: a misspelt path must not ask
    the network.
    """
    found = _NAMED.fullmatch(source)
    if found is None or Path(source).exists() or Path(found["path"]).parent.is_dir():
        return None
    return HubData(path=found["path"], split=found["split"])
