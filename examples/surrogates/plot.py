"""The study as one picture: reward against KL of bandit and model, the trust region, the fixed point of KLPEN."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from bandit import BETA, Bandit
from grid import EPOCHS, NAMES
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from table import Row, chosen, estimate, numbers, of, values

plt.switch_backend("Agg")
COLOURS = dict(zip(NAMES, ("#1f77b4", "#d62728", "#ff9f1c", "#444444"), strict=True))
MARKERS = dict(zip(EPOCHS, ("o", "s"), strict=True))
STYLES = ("-", "--", ":")


def runs(rows: Sequence[Row]) -> list[tuple[str, float, int]]:
    """(surrogate, beta, inner epochs) of every run of the grid."""
    return list(dict.fromkeys((row["surrogate"], float(row["beta"]), int(row["epochs"])) for row in rows))


def settings(run: tuple[str, float, int]) -> dict[str, object]:
    return dict(zip(("surrogate", "beta", "epochs"), run, strict=True))


def point(axis: Axes, run: tuple[str, float, int], x: float, y: float) -> None:
    """A run's end: color the surrogate, shape the inner epochs, filled with KL to SFT."""
    name, beta, epochs = run
    face = COLOURS[name] if beta else "white"
    axis.plot(x, y, MARKERS[epochs], color=COLOURS[name], markerfacecolor=face, markersize=7, zorder=4)


def bandit_panel(axis: Axes, rows: Sequence[Row]) -> None:
    """Ends and ways of the grid below the best that any policy can have."""
    grid = chosen(rows, experiment="grid")
    bandit = Bandit.drawn([int(seed) for seed in values(grid, "seed")])
    tilts = [bandit.optimum(float(beta)) for beta in torch.logspace(1.7, -1.3, 60)]
    frontier = [(float(bandit.kl(logp).mean()), float(bandit.reward(logp).mean())) for logp in tilts]
    axis.plot(*zip(*frontier, strict=True), color="#2ca02c", linewidth=1.2)
    best = bandit.optimum()
    axis.plot(float(bandit.kl(best).mean()), float(bandit.reward(best).mean()), "*", color="#2ca02c", markersize=15)
    for run in runs(grid):
        own = chosen(grid, **settings(run))
        steps = [chosen(own, rollout=step) for step in values(own, "rollout")]
        way = [[estimate(numbers(step, name)).mean for step in steps] for name in ("kl", "reward")]
        axis.plot(*way, color=COLOURS[run[0]], linewidth=0.6, alpha=0.5, linestyle="-" if run[1] else ":")
        point(axis, run, way[0][-1], way[1][-1])
    axis.set(title=f"bandit: the end of each run, mean over seeds (star: optimum at β = {BETA})")


def model_panel(axis: Axes, rows: Sequence[Row]) -> None:
    """Held-out reward and KL at the end of each run; no frontier is known."""
    for row in chosen(rows, surrogate="start"):
        axis.plot(float(row["kl"]), float(row["reward"]), "X", color="#2ca02c", markersize=10)
    ended = [row for row in rows if row["reward"] and row["surrogate"] != "start"]
    for run in runs(ended):
        (row,) = chosen(ended, **settings(run))
        point(axis, run, float(row["kl"]), float(row["reward"]))
    axis.set(xscale="symlog", title="SmolLM2-135M: held-out prompts, one seed (cross: start)")


def trust_panel(axis: Axes, rows: Sequence[Row]) -> None:
    """How near J* a surrogate comes, by learning rate and inner epochs."""
    trust = chosen(rows, experiment="trust")
    rates, epochs = values(trust, "lr"), values(trust, "epochs")
    for name in NAMES:
        for count, style in zip(epochs, STYLES, strict=False):
            found = [of(trust, "gap_closed", surrogate=name, epochs=count, lr=rate) for rate in rates]
            means, errors = [x.mean for x in found], [x.error for x in found]
            axis.errorbar(rates, means, errors, color=COLOURS[name], linestyle=style, marker=".", linewidth=1.2)
    shown = zip(epochs, STYLES, strict=False)
    styles = [
        Line2D([], [], color="gray", linestyle=style, label=f"{count:.0f} inner epoch{'s' * (count > 1)}")
        for count, style in shown
    ]
    axis.legend(handles=styles, fontsize=8, loc="lower left")
    axis.axhline(1, color="#2ca02c", linewidth=1)
    axis.set(xscale="log", xlabel="learning rate", ylabel="share of the gap to J* closed")
    axis.set(title=f"bandit: when a trust region matters (β = {BETA})")


def fixed_point_panel(axis: Axes, rows: Sequence[Row]) -> None:
    """Where KLPEN alone and KLPEN beside the KL to SFT lead, without sampling noise."""
    exact = chosen(rows, experiment="fixed point")
    prices = values(exact, "b")
    for price, alpha in zip(prices, torch.linspace(0.35, 1, len(prices)).tolist(), strict=True):
        for beta, color, style in ((BETA, "#1f77b4", "-"), (0.0, "#d62728", "--")):
            own = chosen(exact, b=price, beta=beta)
            steps = values(own, "rollout")
            means = [estimate(numbers(chosen(own, rollout=step), "gap_closed")).mean for step in steps]
            axis.plot(steps, means, style, color=color, alpha=alpha, marker=".", linewidth=1.2)
            if means[-1] < 0.95:  # those at the optimum lie on one another
                axis.annotate(
                    f"b = {price:g}", (steps[-1], means[-1]), (4, -3), textcoords="offset points", fontsize=7.5
                )
    kinds = ((BETA, "-", "#1f77b4", "with the KL to SFT"), (0.0, "--", "#d62728", "without"))
    axis.legend(handles=[Line2D([], [], linestyle=s, color=c, label=t) for _, s, c, t in kinds], fontsize=8, loc="best")
    axis.axhline(1, color="#2ca02c", linewidth=1)
    axis.set(xscale="log", xlabel="rollouts", ylabel="share of the gap to J* closed", xlim=(0.9, 1.5 * max(steps)))
    axis.set(title="bandit: KLPEN maximised and re-centered, no noise")


def legend() -> list[Line2D]:
    """What color, shape and filling mean."""
    colors = [Line2D([], [], color=COLOURS[name], linewidth=3, label=name) for name in NAMES]
    plain = {"linestyle": "", "color": "gray", "markersize": 7}
    shapes = [Line2D([], [], marker=MARKERS[n], label=f"{n} inner epoch{'s' * (n > 1)}", **plain) for n in EPOCHS]
    filling = [
        Line2D([], [], marker="D", label="with KL to SFT", **plain),
        Line2D([], [], marker="D", markerfacecolor="white", label="without", **plain),
        Line2D([], [], color="#2ca02c", label="best reward at that KL; J*"),
    ]
    return colors + shapes + filling


def plot(path: Path, bandit: Sequence[Row], model: Sequence[Row]) -> None:
    """Write the picture of whatever parts there are."""
    panels = [(bandit_panel, bandit), (model_panel, model), (trust_panel, bandit), (fixed_point_panel, bandit)]
    panels = [(draw, rows) for draw, rows in panels if rows]
    lines = (len(panels) + 1) // 2
    figure, axes = plt.subplots(lines, 2, figsize=(12, 4.7 * lines + 0.6), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (draw, rows) in zip(axes.flat, panels, strict=False):
        axis.set(xlabel="KL to SFT, nats", ylabel="reward")
        draw(axis, rows)
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(10)
    figure.legend(handles=legend(), loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
