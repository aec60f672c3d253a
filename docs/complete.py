"""Lets the API pages list everything public, as a hook of mkdocs.

A page docs/api/ROOM.md names the modules of its room that are worth an order; those which it does not name, but from
which the room exports names, are put behind.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "lightning_rlhf"


def exporting(room: str) -> list[str]:
    """Modules from which a room's `__init__` takes the names it exports; a room of one file is its own module.

    Args:
        room: a folder or module of the package.

    Returns:
        dotted names, in the order of the file.
    """
    folder = PACKAGE / room
    if not folder.is_dir():
        return [f"lightning_rlhf.{room}"]
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    return [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]


def completed(text: str, room: str) -> str:
    """A page with every module of the room's public names."""
    named = re.findall(r"(?m)^::: (\S+)", text)
    missing = [name for name in exporting(room) if name not in named]
    return text + "".join(f"\n::: {name}\n" for name in missing)


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Called by mkdocs with each page before it is rendered."""
    path = Path(page.file.src_uri)
    return completed(markdown, path.stem) if path.parent.name == "api" else markdown
