"""Seconds, tokens/s and memory of a step: ours, TRL's RLOOTrainer and the bare floor, in alternate turns.

    python examples/benchmarks/step.py --models smollm2 tiny --precisions bf16-mixed 32-true

writes step_turns.csv (every turn) and step.csv (medians and ratios).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from table import PHASES, ratio, show, summary, write
from turns import SCRIPTS, alternate, prepared
from work import Work, parsed, parser, works

Row = dict[str, Any]


def arguments(args: Sequence[str] | None) -> Any:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sides", nargs="+", default=list(SCRIPTS), choices=tuple(SCRIPTS), help="who takes turns")
    options.add_argument("--blocks", type=int, default=5, help="measured turns of each side")
    options.add_argument("--warmup", type=int, default=2, help="turns of each side before them: memory grows for two")
    return parsed(options, args, blocks=2, warmup=1)


def ratios(rows: Sequence[Row]) -> Row:
    """Of our side to each other one: wall, CPU and peak memory; and our phases to the floor's."""
    found: Row = {}
    for other in ("trl", "floor"):
        for name in ("wall", "cpu", "rss"):
            found[f"{name}/{other}"] = ratio(rows, name, "ours", other)
    return found | {f"{name}/floor": phase_ratio(rows, name) for name in PHASES if name != "reward"}


def phase_ratio(rows: Sequence[Row], name: str) -> float | None:
    """None where a side does not report the phase."""
    return ratio([row for row in rows if row.get(name)], name, "ours", "floor")


def measured(work: Work, chosen: Any, turns: list[Row]) -> list[Row]:
    """A row of medians for each side; our row has the ratios too."""
    named = {"model": work.model, "precision": work.precision}
    rows = []
    with prepared(work) as ready:
        for row in alternate(ready, chosen.sides, warmup=chosen.warmup, blocks=chosen.blocks, threads=chosen.threads):
            rows.append(named | row)
            write(chosen.out / "step_turns.csv", [*turns, *rows])
    turns += rows
    found = [named | summary(rows, side) for side in chosen.sides]
    return [row | (ratios(rows) if row["side"] == "ours" else {}) for row in found]


def main(args: Sequence[str] | None = None) -> None:
    chosen = arguments(args)
    turns: list[Row] = []
    medians: list[Row] = []
    for work in works(chosen):
        found = measured(work, chosen, turns)
        medians += found
        write(chosen.out / "step.csv", medians)
        print(f"\n{work.model}, {work.precision}, {work.responses} responses x {work.tokens} tokens")
        show([{k: v for k, v in row.items() if k not in ("model", "precision") and "/" not in k} for row in found])
        show([{k: v for k, v in row.items() if "/" in k} for row in found if row["side"] == "ours"])
    print(f"\nstep.csv and step_turns.csv are in {chosen.out}")


if __name__ == "__main__":
    main()
