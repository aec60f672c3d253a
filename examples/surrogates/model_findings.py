"""What the language model says. One seed: figures, and counts over the runs instead of standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from grid import EPOCHS, HELD_OUT, NAMES
from table import Row, markdown, span


class End(NamedTuple):
    """Where a run ended."""

    surrogate: str
    beta: float
    epochs: int
    lr: float
    reward: float
    kl: float
    entropy: float

    @property
    def name(self) -> str:
        return f"{self.surrogate} ({'with' if self.beta else 'no'} KL to SFT, {self.epochs} inner, lr {self.lr:g})"

    def worth(self, beta: float) -> float:
        """The objective: score - beta KL."""
        return self.reward - beta * self.kl


def ends(rows: Sequence[Row]) -> list[End]:
    kinds = (str, float, int, float, float, float, float)
    cells = [[row[name] for name in End._fields] for row in rows if row["reward"]]
    return [End(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in cells]


def model(rows: Sequence[Row]) -> list[str]:
    """The grid at every learning rate: held-out reward at KL."""
    (start,), runs = ([x for x in ends(rows) if (x.surrogate == "start") == first] for first in (True, False))
    beta = max(run.beta for run in runs)
    text = [
        f"Held-out VADER score at KL to SFT, from {start.reward:.2f} at 0, after {max(int(r['rollout'] or 0) for r in rows)}"
        f" rollouts. One seed and {HELD_OUT} prompts: the standard error of a mean of scores in [−1, 1] may be "
        f"{1 / math.sqrt(HELD_OUT):.2f} at worst, so rank no neighbours.",
        _kl_term(runs),
        _old(runs),
        _plain(runs, start),
        _listed("Below the start ended", runs, lambda run: run.reward < start.reward),
        _worth(runs, start, beta),
    ]
    columns = list(dict.fromkeys((run.lr, run.beta, run.epochs) for run in runs))
    head = ["", *(f"lr {lr:g}, β = {b:g}, {epochs} inner" for lr, b, epochs in columns)]
    found = {(run.surrogate, run.lr, run.beta, run.epochs): f"{run.reward:.2f} at {run.kl:.1f}" for run in runs}
    body = [[name, *(found.get((name, *column), "") for column in columns)] for name in NAMES]
    return [" ".join(filter(None, text)), markdown(head, body)]


def _kl_term(runs: Sequence[End]) -> str:
    """What the KL to SFT does, run by run."""
    without = {(run.surrogate, run.epochs, run.lr): run for run in runs if not run.beta}
    pairs = [(run, without.get((run.surrogate, run.epochs, run.lr))) for run in runs if run.beta]
    pairs = [(run, other) for run, other in pairs if other is not None]
    if not pairs:
        return ""
    nearer = sum(run.kl < other.kl for run, other in pairs)
    kls = [fmean(pair[i].kl for pair in pairs) for i in (0, 1)]
    rewards = [fmean(pair[i].reward for pair in pairs) for i in (0, 1)]
    return (
        f"The KL to SFT keeps the policy nearer in {nearer} of {len(pairs)} pairs of runs: {kls[0]:.1f} nats on average "
        f"against {kls[1]:.1f}, at a reward of {rewards[0]:.2f} against {rewards[1]:.2f}."
    )


def _old(runs: Sequence[End]) -> str:
    """Whether KLPEN alone stays as near to SFT as the others do with the KL to SFT."""
    kls = {
        kind: [run.kl for run in runs if run.surrogate.startswith(kind) and not run.beta] for kind in ("KLPEN", "CLIP")
    }
    if not all(kls.values()):
        return ""
    return f"Without it, KLPEN is {span(kls['KLPEN'], 1)} nats from SFT at the end and CLIP {span(kls['CLIP'], 1)}."


def _plain(runs: Sequence[End], start: End) -> str:
    """What the plain ratio does with many steps on a rollout."""
    text = []
    for lr in sorted({run.lr for run in runs}):
        own = [run for run in runs if run.lr == lr and run.epochs == max(EPOCHS)]
        plain, bound = ([x for x in own if (x.surrogate == "unclipped") == kind] for kind in (True, False))
        if plain and bound:
            verdict = "farther than" if min(x.kl for x in plain) > max(x.kl for x in bound) else "not apart from"
            text.append(
                f"At lr {lr:g} and {max(EPOCHS)} inner epochs the plain ratio goes {span([x.kl for x in plain], 1)} nats, "
                f"{verdict} the others ({span([x.kl for x in bound], 1)}), its entropy falling from {start.entropy:.0f} to "
                f"{min(x.entropy for x in plain):.0f} nats a response."
            )
    return " ".join(text)


def _listed(lead: str, runs: Sequence[End], chosen: Callable[[End], bool]) -> str:
    found = [run.name for run in runs if chosen(run)]
    return f"{lead} {len(found)} of {len(runs)}: {'; '.join(found)}." if found else f"{lead} none."


def _worth(runs: Sequence[End], start: End, beta: float) -> str:
    """Negative, mostly: by the objective itself, who is better than no training?"""
    better = [run for run in runs if run.worth(beta) > start.reward]
    best = max(runs, key=lambda run: run.worth(beta))
    return (
        f"By the objective, score − {beta:g}·KL, {len(better)} of {len(runs)} runs are better than no training, and the "
        f"best is {best.name} with {best.worth(beta):.2f} against {start.reward:.2f}."
    )
