"""InstructGPT's three stages as PyTorch Lightning modules: SFT, reward model, and PPO as a contextual bandit.

Importing the package costs nothing; a name is loaded when it is first used. `lightning_rlhf.core` needs torch alone.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_EXPORTS = {
    str(node.module).partition(".")[2]: tuple(name.name for name in node.names)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
}
"""Public names by room, read from the stub that type checkers and editors read."""
_HOME = {name: room for room, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
