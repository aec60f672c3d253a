"""Medians, ratios of turns that ran side by side, tables and CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

PHASES = ("generate", "old_logprobs", "reference", "reward", "update")
Row = Mapping[str, Any]


def column(rows: Sequence[Row], name: str) -> float | None:
    """The median, or None where no row has it."""
    found = [row[name] for row in rows if row.get(name) is not None]
    return median(found) if found else None


def ratio(rows: Sequence[Row], name: str, side: str, other: str) -> float | None:
    """The median over the blocks of side/other, so that both of a ratio ran within a minute of each other."""
    ours, theirs = ({row["block"]: row[name] for row in rows if row["side"] == key} for key in (side, other))
    found = [ours[block] / theirs[block] for block in ours if theirs.get(block)]
    return median(found) if found else None


def complete(row: Row) -> Row:
    """The turn with what lies in no phase: TRL's update, which is no method of its own; the rest of other sides."""
    timed = [row[name] for name in PHASES if row.get(name) is not None]
    if not timed:
        return row
    return {**row, "rest" if row.get("update") is not None else "update": row["wall"] - sum(timed)}


def summary(rows: Sequence[Row], side: str) -> dict[str, Any]:
    """Medians of a side's turns: seconds of a step and of its phases, tokens/s, peak memory."""
    own = [complete(row) for row in rows if row["side"] == side]
    found = {"side": side, "turns": len(own), "wall_s": column(own, "wall"), "cpu_s": column(own, "cpu")}
    found["tokens_per_s"] = median(row["tokens"] / row["wall"] for row in own)
    found |= {f"{name}_s": column(own, name) for name in (*PHASES, "rest")}
    found["peak_rss_mb"] = max(row["rss"] for row in own)
    held = [row["gpu"] for row in own if "gpu" in row]
    return found | ({"peak_gpu_mb": max(held)} if held else {})


def write(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file with the columns of all rows, in the order they first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(value) for name, value in row.items()} for row in rows)


def text(value: Any) -> str:
    """Four digits; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def show(rows: Sequence[Row]) -> None:
    """Print the rows under their names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([text(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, found)) for found in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
