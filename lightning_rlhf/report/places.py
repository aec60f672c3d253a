"""Search for the files of each run in the given folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

VERSION = re.compile(r"version_(\d+)")
"""Folder names of CSVLogger."""
OTHERS = ("rollouts.jsonl", "samples.jsonl", "config.yaml", "hparams.yaml")
"""Files of a run beside `metrics.csv`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Files of a run.

    Attributes:
        folder: as it was named.
        root: the run's own, in `folder` or below it.
        logs: its `metrics.csv` files, by version.
        others: its other files, by version.
        sole: True if it is the only run of `folder`.
    """

    folder: Path
    root: Path
    logs: tuple[Path, ...]
    others: tuple[Path, ...]
    sole: bool

    @property
    def name(self) -> str:
        """Name of the folder, with the path to the run if it holds several."""
        name = self.folder.resolve().name
        if VERSION.fullmatch(name):
            name = f"{self.folder.resolve().parent.name}/{name}"
        way = "" if self.sole else self.root.relative_to(self.folder).as_posix()
        return name if way in ("", ".") else f"{name}/{way}"


def find_places(folder: Path) -> list[Place]:
    """Find the runs in a folder and below it.

    Raises:
        ValueError: there is no such folder, or no log in it.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} (working directory {Path.cwd()}): name the folder of a run")
    logs = _grouped(folder.rglob("metrics.csv"), lambda path: _root(path, folder))
    others = _grouped(
        (path for name in OTHERS for path in folder.rglob(name)), lambda path: _owner(path, list(logs), folder)
    )
    rows = {root for root, files in others.items() if any(path.suffix == ".jsonl" for path in files)}
    roots = sorted(logs.keys() | rows)
    if not roots:
        raise ValueError(
            f"{folder} holds no run: there is no metrics.csv, rollouts.jsonl or samples.jsonl in it or below; log with "
            "Lightning's CSVLogger, as every config does, and name its folder"
        )
    return [
        Place(folder, root, tuple(logs.get(root, ())), tuple(others.get(root, ())), len(roots) == 1) for root in roots
    ]


def names_of(places: Sequence[Place]) -> list[str]:
    """Name the runs uniquely, by their given paths if names coincide."""
    often = Counter(place.name for place in places)
    return [place.name if often[place.name] == 1 else place.root.as_posix() for place in places]


def _grouped(paths: Iterable[Path], root_of: Callable[[Path], Path]) -> dict[Path, list[Path]]:
    groups: dict[Path, list[Path]] = {}
    for path in sorted(paths, key=_order):
        groups.setdefault(root_of(path), []).append(path)
    return groups


def _order(path: Path) -> tuple[str, int, str]:
    """Sort key that orders versions by number."""
    version = VERSION.fullmatch(path.parent.name)
    return (path.parent.parent.as_posix(), int(version[1]), path.name) if version else (path.parent.as_posix(), -1, "")


def _root(path: Path, folder: Path) -> Path:
    versioned = VERSION.fullmatch(path.parent.name) and path.parent != folder
    return path.parent.parent if versioned else path.parent


def _owner(path: Path, roots: Sequence[Path], folder: Path) -> Path:
    """Return the innermost run around a file, else the only run or else a new one."""
    around = [root for root in roots if path.is_relative_to(root)]
    if around:
        return max(around, key=lambda root: len(root.parts))
    return roots[0] if len(roots) == 1 else _root(path, folder)
