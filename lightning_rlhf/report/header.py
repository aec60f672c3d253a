"""Facts of a run in its logs (method, model, batch, rates, seed, dates)."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from lightning_rlhf.report.runs import Run
from lightning_rlhf.report.verdict import number

BANDIT = {"model.algorithm.level": "SequenceLevel", "model.algorithm.advantage": "BanditAdvantage"}
"""Settings of the default algorithm, which has no name."""


def facts(run: Run) -> dict[str, str]:
    """Collect the facts by name, in the order of the page."""
    entries = {
        "method": _method(run),
        "policy" if run.is_rl else "model": _given(
            run, "model.policy.path", "model.policy", "model.model.path", "model.model"
        ),
        "reward": _given(run, "model.reward"),
        "reward model": _given(run, "model.reward.path"),
        "batch": _batch(run),
        "learning rate": _rate(run),
        "β": _beta(run),
        "seed": _given(run, "seed_everything"),
        "length": _length(run),
        "dates": _dates(run),
        "took": _duration(run),
    }
    return {name: text for name, text in entries.items() if text}


def _given(run: Run, *keys: str) -> str:
    """Return the first setting that is neither missing nor null."""
    texts = (run.settings.get(key, "") for key in keys)
    return next((text for text in texts if text not in ("", "None", "{}")), "")


def _method(run: Run) -> str:
    module, algorithm = _given(run, "model"), _given(run, "model.algorithm")
    if "model.algorithm" in run.settings and algorithm in ("", "Algorithm"):
        bandit = all(run.settings.get(key, value) == value for key, value in BANDIT.items())
        algorithm = "contextual bandit" if bandit else algorithm
    return ", ".join(filter(None, (module, algorithm)))


def _batch(run: Run) -> str:
    """Describe the prompts × samples in the settings and the logged number of responses of a rollout."""
    size, samples = _given(run, "data.batch_size"), _given(run, "model.generation.samples_per_prompt")
    if not run.is_rl:
        several = _given(run, "trainer.accumulate_grad_batches")
        return f"{size} × {several} accumulated" if size and several not in ("", "1") else size
    episodes = run.metrics["episode"]
    counted = f"{_count(episodes.y[0], 'response')} a rollout" if episodes.x[:1] == (0,) else ""
    chosen = " × ".join(_count(text, what) for text, what in ((size, "prompt"), (samples, "sample")) if text)
    return ", ".join(filter(None, (chosen, counted)))


def _rate(run: Run) -> str:
    text = _given(run, "model.lr", "model.optimizer.lr")
    try:
        return number(float(text))
    except ValueError:
        return text


def _beta(run: Run) -> str:
    """Describe β by its setting, or by the log if a class sets it."""
    logged, chosen = run.metrics["objective/kl_coef"].y, _given(run, "model.algorithm.beta")
    if not logged or chosen[:1].isdigit():
        return chosen
    ends = dict.fromkeys(number(value) for value in (logged[0], logged[-1]))
    return ", ".join(filter(None, (chosen, " → ".join(ends))))


def _length(run: Run) -> str:
    """Number of logged rollouts or optimizer steps."""
    logged = run.metrics.first("objective/scores") if run.is_rl else run.metrics.first("train/loss", "lr")
    if not logged:
        return ""
    return _count(logged.x[-1] + 1, "rollout" if run.is_rl else "optimizer step")


def _count(number: float | str, what: str) -> str:
    text = number if isinstance(number, str) else f"{number:,.0f}"
    return f"{text} {what}{'s' * (text != '1')}"


def _seconds(run: Run) -> float | None:
    """Seconds from the first settings to the last metrics; None if shorter than the steps: files were copied."""
    if run.written is None:
        return None
    seconds, steps = run.written[1] - run.written[0], math.fsum(run.metrics["time/step"].y)
    return seconds if seconds >= 1 and seconds >= 0.9 * steps else None


def _dates(run: Run) -> str:
    if run.written is None or _seconds(run) is None:
        return ""
    start, end = (datetime.fromtimestamp(when, UTC) for when in run.written)
    return f"{start:%Y-%m-%d %H:%M} – {end:{'%H:%M' if start.date() == end.date() else '%Y-%m-%d %H:%M'}} UTC"


def _duration(run: Run) -> str:
    seconds, steps = _seconds(run), math.fsum(run.metrics["time/step"].y)
    if seconds is None and not steps:
        return ""
    minutes, rest = divmod(round(steps if seconds is None else seconds), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return text if seconds is not None else f"{text} in its steps"
