"""One panel for each failure: its metric over rollouts, without a guard and with each."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from failure_cases import Failure

plt.switch_backend("Agg")
COLORS = ("#c0392b", "#1f77b4", "#2ca02c", "#999999")


def plot(points: list[dict], failures: dict[str, Failure], path: Path) -> None:
    """Draw the panels; a dotted line is the threshold.

    Args:
        points: failure, run, metric, rollout and value of each.
        failures: by name.
        path: of the PNG.
    """
    columns = min(4, len(failures))
    rows = -(-len(failures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(failures) :]:
        axis.axis("off")
    for axis, (name, failure) in zip(axes.flat, failures.items(), strict=False):
        drawn = failure.drawn or failure.metric
        own = [point for point in points if (point["failure"], point["metric"]) == (name, drawn)]
        for color, run in zip(COLORS, dict.fromkeys(point["run"] for point in own), strict=False):
            line = [(point["rollout"], point["value"]) for point in own if point["run"] == run]
            axis.plot(*zip(*line, strict=True), color=color, label=run, linewidth=1.2, marker=".", markersize=3)
        if drawn == failure.metric:
            axis.axhline(failure.threshold, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel("rollout", fontsize=8)
        axis.set_ylabel(drawn, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
