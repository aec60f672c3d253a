"""Held-out pass rate of every run, over the tokens drawn and over the minutes."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

plt.switch_backend("Agg")
COLORS = {"grpo": "#444444", "dynamic": "#1f77b4"}
NAMES = {"grpo": "GRPO", "dynamic": "GRPO with dynamic sampling"}


def plot(rows: list[dict], path: Path) -> None:
    """Draw one line for each method and seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, quantity, label in zip(axes, ("tokens", "minutes"), ("response tokens drawn", "minutes"), strict=True):
        for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in rows):
            own = [row for row in rows if (row["method"], row["seed"]) == (method, seed)]
            name = NAMES[method] if seed == 0 else None
            x, y = [row[quantity] for row in own], [row["pass_rate"] for row in own]
            axis.plot(x, y, color=COLORS[method], label=name, marker=".", linewidth=1)
        axis.axhline(0.75, color="#bbbbbb", linewidth=0.8)
        axis.set(xlabel=label, ylim=(0, 1))
    axes[0].set_ylabel("pass rate on held-out problems")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
