"""Sums of two one-digit terms, split by their operands."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightning_rlhf.data.reasoning_gym import ReasoningGymRows, read_reasoning_gym

DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
HELD_OUT = 5
"""Every fifth pair of operands is held out."""


def operands(prompt: str) -> tuple[int, int]:
    """The two digits, the smaller first: 3 + 8, 8 + 3, 3 - 8 and 8 - 3 are one pair."""
    a, b = map(int, re.findall(r"\d", prompt))
    return min(a, b), max(a, b)


def prepare(folder: Path) -> dict[str, Path]:
    """Write the problems of each part; no pair of operands is in both."""
    rows = [record.row for record in read_reasoning_gym(ReasoningGymRows(task="chain_sum", size=4000, config=DIGITS))]
    pairs = sorted({operands(row["prompt"]) for row in rows})
    held_out = set(pairs[HELD_OUT // 2 :: HELD_OUT])
    parts = {
        "train": [row for row in rows if operands(row["prompt"]) not in held_out],
        "val": [row for row in rows if operands(row["prompt"]) in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{name}: {len(part)} problems of {len({operands(row['prompt']) for row in part})} pairs of digits")
    return {name: folder / f"{name}.jsonl" for name in parts}
