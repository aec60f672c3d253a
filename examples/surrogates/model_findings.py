"""What the language model says. One seed: figures, and counts over the runs instead of standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from grid import EPOCHS, HELD_OUT, NAMES
from table import Row, markdown, span


class End(NamedTuple):
    """Where a run ended."""

    surrogate: str
    beta: float
    epochs: int
    reward: float
    kl: float
    entropy: float

    @property
    def name(self) -> str:
        return f"{self.surrogate} ({'with' if self.beta else 'no'} KL to SFT, {self.epochs} inner)"

    def worth(self, beta: float) -> float:
        """The objective: score - beta KL."""
        return self.reward - beta * self.kl


def ends(rows: Sequence[Row]) -> list[End]:
    kinds = (str, float, int, float, float, float)
    cells = [[row[name] for name in End._fields] for row in rows if row["reward"]]
    return [End(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in cells]


def model(rows: Sequence[Row]) -> list[str]:
    """The grid: held-out reward at KL."""
    (start,), runs = ([x for x in ends(rows) if (x.surrogate == "start") == first] for first in (True, False))
    rollouts = max(int(row["rollout"] or 0) for row in rows)
    rate = ", ".join(dict.fromkeys(row["lr"] for row in rows if row["surrogate"] != "start"))
    error = 1 / math.sqrt(HELD_OUT)
    text = [
        f"Held-out VADER score at KL to SFT, from {start.reward:.2f} at 0, after {rollouts} rollouts at lr {rate}. One "
        f"seed and {HELD_OUT} prompts: a mean of scores in [−1, 1] has a standard error of up to {error:.2f}, "
        "so neighbors are not to be ranked.",
        _kl_term(runs),
        _plain(runs, start),
        _steps(rows),
        _below(runs, start),
        _worth(runs, start),
    ]
    columns = list(dict.fromkeys((run.beta, run.epochs) for run in runs))
    head = ["reward at KL", *(f"β = {beta:g}, {epochs} inner" for beta, epochs in columns)]
    found = {(run.surrogate, run.beta, run.epochs): f"{run.reward:.2f} at {run.kl:.1f}" for run in runs}
    body = [[name, *(found.get((name, *column), "") for column in columns)] for name in NAMES]
    return [" ".join(filter(None, text)), markdown(head, body)]


def _kl_term(runs: Sequence[End]) -> str:
    """What the KL to SFT does, run by run; whether KLPEN's KL to the old policy does the same."""
    without = {(run.surrogate, run.epochs): run for run in runs if not run.beta}
    pairs = [(run, without[run.surrogate, run.epochs]) for run in runs if run.beta]
    nearer = sum(run.kl < other.kl for run, other in pairs)
    kls = [fmean(pair[i].kl for pair in pairs) for i in (0, 1)]
    rewards = [fmean(pair[i].reward for pair in pairs) for i in (0, 1)]
    return (
        f"The KL to SFT keeps the policy nearer in {nearer} of {len(pairs)} pairs of runs: {kls[0]:.1f} nats on "
        f"average against {kls[1]:.1f}, at a reward of {rewards[0]:.2f} against {rewards[1]:.2f}."
    )


def _plain(runs: Sequence[End], start: End) -> str:
    """What the plain ratio does with many steps on a rollout."""
    many = [run for run in runs if run.epochs == max(EPOCHS)]
    plain, bound = ([run for run in many if (run.surrogate == "unclipped") == kind] for kind in (True, False))
    apart = min(run.kl for run in plain) > max(run.kl for run in bound)
    return (
        f"With {max(EPOCHS)} inner epochs the plain ratio ends {span([run.kl for run in plain], 1)} nats away, "
        f"{'farther than all' if apart else 'not apart from those'} with a trust region "
        f"({span([run.kl for run in bound], 1)}), its entropy down from {start.entropy:.0f} nats a response to "
        f"{min(run.entropy for run in plain):.0f}."
    )


def _steps(rows: Sequence[Row]) -> str:
    """Negative: how far the first rollout's updates went, before anything can have adapted."""
    first = [(int(row["epochs"]), float(row["approxkl"])) for row in rows if row["rollout"] == "0"]
    once, many = ([moved for count, moved in first if count == epochs] for epochs in (min(EPOCHS), max(EPOCHS)))
    if min(many) < 10 * max(once):
        return ""
    return (
        f"No surrogate kept those {max(EPOCHS)} epochs small: already in the first rollout ½(log ρ)² is "
        f"{min(many):.0f} to {max(many):.0f} on average, against {max(once):.2f} with {min(EPOCHS)}."
    )


def _below(runs: Sequence[End], start: End) -> str:
    """Negative: who ended worse than it started."""
    found = [run.name for run in runs if run.reward < start.reward]
    return f"Below the start ended: {', '.join(found)}." if found else "None ended below the start."


def _worth(runs: Sequence[End], start: End) -> str:
    """By the objective itself, who is better than no training?"""
    beta = max(run.beta for run in runs)
    better = [run for run in runs if run.worth(beta) > start.reward]
    best = max(runs, key=lambda run: run.worth(beta))
    return (
        f"By the objective, score − {beta:g}·KL, {len(better)} of {len(runs)} runs are better than no training; "
        f"the best is {best.name} with {best.worth(beta):.2f} against {start.reward:.2f}."
    )
