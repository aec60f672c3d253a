"""Logged numbers at the start and end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from lightning_rlhf.report.metrics import EVALUATIONS, Series
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.shares import share_names
from lightning_rlhf.report.statistics import by_iteration, thinned

ROWS = (
    ("held-out reward", ("eval/reward", "test/reward"), "score"),
    ("held-out KL to the reference, nats", ("eval/kl", "test/kl"), "kl"),
    ("held-out responses that end", ("eval/eos_rate", "test/eos_rate"), "ended"),
    ("held-out length, tokens", ("eval/response_length", "test/response_length"), "length"),
    ("held-out pretraining loss, nats per token", ("eval/ptx_loss", "test/ptx_loss"), ""),
    ("reward", ("objective/scores",), ""),
    ("KL to the reference, nats", ("objective/kl",), ""),
    ("length, tokens", ("objective/response_length",), ""),
    ("responses that end", ("objective/eos_rate",), ""),
    ("entropy of the next token, nats", ("policy/entropy_avg",), ""),
    ("clip fraction", ("policy/clipfrac_avg",), ""),
    ("seconds of a step", ("time/step",), ""),
    ("accuracy on held-out pairs", ("eval/accuracy", "test/accuracy"), ""),
    ("calibration error", ("eval/calibration_error", "test/calibration_error"), ""),
    ("held-out loss", ("eval/loss", "test/loss"), ""),
    ("training loss", ("train/loss",), ""),
)
"""Label, logged names, and the column of `samples.jsonl` that also has the state before training."""


@dataclass(frozen=True, slots=True)
class Change:
    """Change of a number over a run.

    Attributes:
        key: in the log.
        first: value at the start.
        last: value at the end.
        series: all values, thinned.
    """

    key: str
    first: float
    last: float
    series: Series

    @property
    def moved(self) -> float | None:
        """End minus start; None if it was measured once."""
        return self.last - self.first if len(self.series.x) > 1 else None


def rows_of(run: Run) -> tuple[tuple[str, tuple[str, ...], str], ...]:
    """Return the rows of a run: the rewards of its named held-out sets and its held-out shares stand before `ROWS`."""
    rewards = [(f"held-out reward, {name}", (f"eval@{name}/reward", f"test@{name}/reward"), "") for name in run.sets]
    shares = [(f"held-out {label}", (name,), "") for label, name in share_names(run).items()]
    return (*rewards, *shares, *ROWS)


def changes(run: Run) -> dict[str, Change]:
    """Collect the changes of all logged numbers by label."""
    moves = {}
    for what, names, column in rows_of(run):
        counted = by_iteration(run.held_out.column(column)) if column else Series()
        name = next((name for name in names if run.metrics[name]), names[0])
        series = counted or run.metrics[name]
        if series:
            size = edge(len(series.y)) if not name.startswith(EVALUATIONS) else 1
            first, last = fmean(series.y[:size]), fmean(series.y[-size:])
            moves[what] = Change(name, first, last, thinned(series, 80))
    return moves


def edge(count: int) -> int:
    """Number of training rows averaged at either end: a tenth, because a single rollout is noise."""
    return max(count // 10, 1)
