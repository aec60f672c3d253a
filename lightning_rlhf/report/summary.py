"""Logged numbers at the start and end of a run."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from lightning_rlhf.report.metrics import EVALUATIONS, Series
from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.statistics import by_iteration, thinned

SCORE, KL = "mean r(x, y), after the shaping rules", "mean Σ_t log π_old − log π_ref of a response: KL(π_old‖π_ref)"
LENGTH, ENDED = "mean tokens of a response, its end token included", "share of responses that ended"
ROWS = (
    ("held-out reward", ("eval/reward", "test/reward"), "score", SCORE),
    ("held-out KL to the reference, nats", ("eval/kl", "test/kl"), "kl", KL),
    ("held-out responses that end", ("eval/eos_rate", "test/eos_rate"), "ended", ENDED),
    ("held-out length, tokens", ("eval/response_length", "test/response_length"), "length", LENGTH),
    (
        "held-out pretraining loss, nats per token",
        ("eval/ptx_loss", "test/ptx_loss"),
        "",
        "mean −log π(token) of the held-out texts",
    ),
    ("reward", ("objective/scores",), "", SCORE),
    ("KL to the reference, nats", ("objective/kl",), "", KL),
    ("length, tokens", ("objective/response_length",), "", LENGTH),
    ("responses that end", ("objective/eos_rate",), "", ENDED),
    (
        "entropy of the next token, nats",
        ("policy/entropy_avg",),
        "",
        "mean entropy of the next token, under the weights that sample",
    ),
    (
        "clip fraction",
        ("policy/clipfrac_avg",),
        "",
        "share of actions whose ratio or weight was clipped; surrogates that clip",
    ),
    ("seconds of a step", ("time/step",), "", "the whole rollout with its update"),
    (
        "accuracy on held-out pairs",
        ("eval/accuracy", "test/accuracy"),
        "",
        "share of pairs whose preferred response scores higher",
    ),
    (
        "calibration error",
        ("eval/calibration_error", "test/calibration_error"),
        "",
        "Σ_bins pairs of the bin / pairs · ∣accuracy − mean confidence∣",
    ),
    (
        "held-out loss",
        ("eval/loss", "test/loss"),
        "",
        "stages 1 and 2: mean −log π(token); mean ranking loss of a prompt",
    ),
    (
        "training loss",
        ("train/loss",),
        "",
        "stages 1 and 2: mean −log π(token) of the step; mean ranking loss of the step's prompts",
    ),
)
"""Label, logged names, column of `samples.jsonl` that also has the state before training, and the glossary's
meaning, copied because importing it would load the modules."""


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


def changes(run: Run) -> dict[str, Change]:
    """Collect the changes of all logged numbers by label."""
    moves = {}
    for what, names, column, _ in ROWS:
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
