"""Fingerprint of a model's folder or file, which identifies the model wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_rlhf.folders.inspection import TOKENIZERS

LOADED = (
    "adapter_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""Files that are read beside config, tokenizer and weights."""
UNREAD = ("transformers_version", "_name_or_path", "base_model_name_or_path")
"""Keys of configs that decide nothing, or are paths."""
BLOCK, BLOCKS = 4096, 64


def fingerprint(path: Path, *, weights: str = "*.safetensors") -> dict[str, Any]:
    """Fingerprint `path` by file name: the values of configs, and size and digest of other files.

    Weights are read at 64 places, 256 KiB in all: training moves all of them, so that another model shows at each.

    Args:
        path: a model folder, or a single file.
        weights: pattern of the files that hold them.
    """
    if path.is_file():
        return {"content": _digest(path)}
    prints: dict[str, Any] = {}
    for file in _files(path, weights):
        values = _values(file) if file.name.endswith("config.json") else None
        prints[file.name] = _digest(file) if values is None else values
    return prints


def _files(folder: Path, weights: str) -> Iterator[Path]:
    patterns = ("config.json", *LOADED, *TOKENIZERS, weights)
    names = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    yield from sorted(names)


def _values(file: Path) -> dict[str, Any] | None:
    """Values of a config with nested ones as text; returns None if it is no JSON object."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        plain = {key: value for key, value in config.items() if key not in UNREAD}
        return {key: json.dumps(x, sort_keys=True) if isinstance(x, dict | list) else x for key, x in plain.items()}
    except (ValueError, AttributeError, RecursionError):
        return None


def _digest(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as content:
        if size <= BLOCK * BLOCKS:
            digest.update(content.read())
        else:
            for number in range(BLOCKS):
                content.seek((size - BLOCK) * number // (BLOCKS - 1))
                digest.update(content.read(BLOCK))
    return f"{size} bytes, {digest.hexdigest()[:16]}"
