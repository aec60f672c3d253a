"""Files of a run, as Lightning and the callbacks write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def write_csv(path: Path, rows: Rows) -> None:
    """As Lightning's CSVLogger does: a column for every name, empty where a row has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def sample(iteration: int, index: int, score: float, response: str, **more: Any) -> dict[str, Any]:
    """A line of `samples.jsonl`."""
    row = {"iteration": iteration, "stage": "val", "index": index, "prompt": f"prompt {index}", "response": response}
    return row | {"length": 3, "ended": True, "raw_score": score, "score": score, "kl": 0.5 * iteration} | more
