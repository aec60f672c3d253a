"""The first thing to read: each number where the run began and where it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lightning_rlhf.report.metrics import Series
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import by_iteration, thinned

ROWS = (
    ("held-out reward", ("eval/reward", "test/reward"), "score"),
    ("held-out KL to the reference, nats", ("eval/kl", "test/kl"), "kl"),
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
"""What, logged names, and the column of `samples.jsonl` that has the state before training too."""
EDGE = 10
"""Of a series of training rows, the tenth at either end is averaged: a single rollout is noise."""


@dataclass(frozen=True, slots=True)
class Change:
    """A number over a run.

    Attributes:
        what: in words, with its unit.
        run: name.
        first: where it began.
        last: where it ended.
        series: all of it, thinned.
    """

    what: str
    run: str
    first: float
    last: float
    series: Series


def changes(runs: Sequence[Run]) -> list[Change]:
    """Those that were logged, by number and then by run."""
    found = []
    for what, names, column in ROWS:
        for run in runs:
            counted = by_iteration(run.held_out.column(column)) if column else Series()
            series = counted or run.metrics.first(*names)
            if series:
                size = 1 if names[0].startswith("eval/") else max(len(series.y) // EDGE, 1)
                first, last = fmean(series.y[:size]), fmean(series.y[-size:])
                found.append(Change(what, run.name, first, last, thinned(series, 80)))
    return found
