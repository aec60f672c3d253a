"""Output at the end of a run: paths of the results and the measured numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from lightning_rlhf.callbacks import Export, PredictionWriter, RunCheckpoint
from lightning_rlhf.report.glossary import find, meaning
from lightning_rlhf.text.escape import terminal

NEXT = {
    "SFTModule": "lightning-rlhf fit --config reward --model.model {model} --data.train RANKINGS",
    "RewardModule": "lightning-rlhf fit --config ppo --model.policy SFT_MODEL --model.reward.path {model} "
    "--data.train PROMPTS",
}
"""Command of the next stage, by the module that was trained."""
WIDTH = 110
"""Columns of the table of numbers."""


def results(trainer: Any) -> str:
    """List the paths of a training run's results and the commands for the next steps."""
    root = Path(trainer.default_root_dir)
    exports = [str(each.place) for each in trainer.callbacks if isinstance(each, Export)]
    saved = [each.last_model_path for each in trainer.callbacks if isinstance(each, RunCheckpoint)]
    places = [("model", path) for path in exports]
    places += [("checkpoint", _short(path)) for path in saved if path]
    places += [("logs", log.log_dir) for log in trainer.loggers if getattr(log, "log_dir", None)]
    following = NEXT.get(type(trainer.lightning_module).__name__)
    if following and exports:
        places.append(("next stage", following.format(model=exports[0])))
    places.append(("report", f"lightning-rlhf report {root}"))
    return _columns(places)


def predictions(trainer: Any) -> str:
    """List the paths of the responses of `predict`."""
    files = [str(each.place) for each in trainer.callbacks if isinstance(each, PredictionWriter)]
    return _columns([("responses", path) for path in files])


def numbers(metrics: Mapping[str, SupportsFloat]) -> str:
    """Format a table of measured numbers with standard error (if known), unit and meaning."""
    rows: list[tuple[str, ...]] = []
    for key, value in metrics.items():
        if key.removesuffix("_se") != key and key.removesuffix("_se") in metrics:
            continue
        entry = find(key)
        error = metrics.get(f"{key}_se")
        unit = "" if entry is None or entry.unit == "1" else entry.unit
        plus = "" if error is None else f"± {float(error):.2g}"
        rows.append((key, f"{float(value):.4g}", plus, unit, meaning(key)))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max((len(row[place]) for row in rows), default=0) for place in range(4)]
    indent = sum(widths) + 8
    lines = []
    for key, value, error, unit, text in rows:
        opening = f"{key:<{widths[0]}}  {value:>{widths[1]}}  {error:<{widths[2]}}  {unit:<{widths[3]}}  "
        first, *others = textwrap.wrap(text, max(WIDTH - indent, 30)) or [""]
        lines += [(opening + first).rstrip(), *(" " * indent + line for line in others)]
    return "\n".join(map(terminal, lines))


def _columns(pairs: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in pairs), default=0) + 1
    return "\n".join(terminal(f"{name + ':':<{width}} {text}") for name, text in pairs)


def _short(path: str) -> str:
    """Make a path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
