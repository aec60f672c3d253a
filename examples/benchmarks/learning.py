"""Reward against CPU seconds: ours and TRL's RLOOTrainer on the same prompts, reward and learning rate.

    python examples/benchmarks/learning.py --seeds 0 1 2

Both sides take turns, a step each. A side has reached a target at the first step where the mean score of its last ten
steps is at least the target; its time is the CPU seconds of its own process up to that step, loading left out. There
are two targets: the level, +0.4 of VADER's compound score, and the gain, 0.4 above the untrained model, whose score is
the mean of all first rollouts. Writes learning.csv (every step), learning_times.csv and learning.png.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from table import show, write
from turns import alternate, prepared
from work import parsed, parser, works

Row = dict[str, Any]
WINDOW = 10
SIDES = ("ours", "trl")


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="who takes turns")
    options.add_argument("--seeds", nargs="+", type=int, default=[0])
    options.add_argument("--steps", type=int, default=80, help="at most; a seed ends when both have all targets")
    options.add_argument("--tokens", type=int, default=32, help="longest response; responses end by themselves")
    options.add_argument("--lr", type=float, default=2e-5)
    options.add_argument("--target", type=float, default=0.4, help="as a level, and as a gain over the start")
    return parsed(options, args, steps=WINDOW + 2, tokens=4)


def window_means(scores: Sequence[float]) -> list[float | None]:
    """Mean of the last ten scores at every step; None before there are ten."""
    sums = [0.0, *accumulate(scores)]
    return [(sums[i] - sums[i - WINDOW]) / WINDOW if i >= WINDOW else None for i in range(1, len(sums))]


def reached(rows: Sequence[Row], target: float) -> Row | None:
    """The step at which a side reached the target, of the rows of one side and seed in order."""
    means = window_means([row["score"] for row in rows])
    return next((row for row, mean in zip(rows, means, strict=True) if mean is not None and mean >= target), None)


def start(rows: Sequence[Row]) -> float:
    """Score of the untrained model: the first rollout comes before any update."""
    return fmean(row["score"] for row in rows if row["step"] == 1)


def run(work: Any, chosen: Any, rows: list[Row]) -> None:
    """One seed: turns until both sides have all targets, or the steps are used up."""
    spent: defaultdict[str, Row] = defaultdict(lambda: {"cpu": 0.0, "wall": 0.0})
    own: list[Row] = []
    for turn in alternate(work, chosen.sides, warmup=0, blocks=chosen.steps, threads=chosen.threads):
        total = spent[turn["side"]]
        total.update(cpu=total["cpu"] + turn["cpu"], wall=total["wall"] + turn["wall"])
        row = {"seed": work.seed, "side": turn["side"], "step": turn["block"] + 1, "score": turn["score"], **total}
        own.append(row)
        rows.append(row)
        write(chosen.out / "learning.csv", rows)
        goal = max(chosen.target, start(own) + chosen.target)
        if all(reached([row for row in own if row["side"] == side], goal) for side in chosen.sides):
            return


def times(rows: Sequence[Row], sides: Sequence[str], target: float) -> list[Row]:
    """For each target and seed, when each side reached it, and the ratio of CPU seconds."""
    untrained, found = start(rows), []
    for name, goal in (("level", target), ("gain", untrained + target)):
        for seed in sorted({row["seed"] for row in rows}):
            cell: Row = {"target": name, "score": goal, "start": untrained, "seed": seed}
            for side in sides:
                at = reached([row for row in rows if (row["seed"], row["side"]) == (seed, side)], goal) or {}
                cell |= {f"{side}_{name}": at.get(name) for name in ("step", "cpu", "wall")}
            cpu = [cell.get(f"{side}_cpu") for side in SIDES]
            found.append(cell | {"ours/trl": cpu[0] / cpu[1] if all(cpu) else None})
    return found


def plot(path: Path, rows: Sequence[Row], target: float) -> None:
    """Ten-step means; a line for each seed."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colors = dict(zip(SIDES, ("tab:blue", "tab:orange"), strict=True))
    for side, seed in sorted({(row["side"], row["seed"]) for row in rows}):
        own = [row for row in rows if (row["side"], row["seed"]) == (side, seed)]
        points = [(row["cpu"], mean) for row, mean in zip(own, window_means([r["score"] for r in own]), strict=True)]
        label = side if seed == min(row["seed"] for row in rows) else None
        axis.plot(*zip(*[p for p in points if p[1] is not None], strict=True), color=colors[side], label=label)
    for goal in (target, start(rows) + target):
        axis.axhline(goal, color="gray", linewidth=0.8, linestyle="--")
    axis.set(xlabel="CPU seconds", ylabel=f"VADER score, mean of {WINDOW} steps")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    rows: list[Row] = []
    changes = {"tokens": chosen.tokens, "lr": chosen.lr, "end": None}
    with prepared(works(chosen)[0].having(**changes)) as work:
        for seed in chosen.seeds:
            run(work.having(seed=seed), chosen, rows)
    found = times(rows, chosen.sides, chosen.target)
    write(chosen.out / "learning_times.csv", found)
    plot(chosen.out / "learning.png", rows, chosen.target)
    show(found)
    for name in ("level", "gain"):
        ratios = [row["ours/trl"] for row in found if row["target"] == name and row["ours/trl"]]
        if ratios:
            print(f"{name}: ours needs {median(ratios):.2f}x TRL's CPU seconds (median of {len(ratios)} seeds)")
    print(f"learning.csv, learning_times.csv and learning.png are in {chosen.out}")


if __name__ == "__main__":
    main()
