"""Reader of runs from their logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_rlhf.report.metrics import Metrics, first_step, read_metrics
from lightning_rlhf.report.palette import color
from lightning_rlhf.report.places import OTHERS, Place, find_places, names_of
from lightning_rlhf.report.responses import Responses, read_rollouts, read_samples
from lightning_rlhf.report.settings import read_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Logs of one run.

    Attributes:
        name: in legends.
        color: in figures and tables.
        metrics: of `metrics.csv`.
        rollouts: of `rollouts.jsonl`; empty if there is none.
        samples: of `samples.jsonl`, by stage, or stage and set; empty if there is none.
        settings: of `config.yaml` or `hparams.yaml`, dotted key → value.
        written: times of its first settings and last metrics, seconds since 1970; None if a file is missing.
        notes: for the report's readers, on files that were joined or left out.
    """

    name: str
    color: str = color(0)
    metrics: Metrics = field(default_factory=Metrics)
    rollouts: Responses = field(default_factory=Responses)
    samples: Mapping[str, Responses] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    written: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> Responses:
        """Samples of validation, or else of the test."""
        return self.samples.get("val") or self.samples.get("test") or Responses()

    @property
    def sets(self) -> Mapping[str, Responses]:
        """Samples of each named held-out set, by its name; empty where there are metrics alone."""
        names = dict.fromkeys([*self.metrics.sets, *(key.partition("@")[2] for key in self.samples if "@" in key)])
        return {
            name: self.samples.get(f"val@{name}") or self.samples.get(f"test@{name}") or Responses() for name in names
        }

    @property
    def is_reward_model(self) -> bool:
        """True if the run trained a reward model."""
        return bool(self.metrics.first("eval/accuracy", "eval/margin", "test/accuracy"))

    @property
    def is_rl(self) -> bool:
        """True if the run trained a policy on a reward."""
        scored = self.metrics.first("objective/scores", "eval/reward", "test/reward")
        return bool(scored or self.rollouts.numbers or self.samples)

    @property
    def stage(self) -> int:
        """Index of the stage (0 fine-tuning, 1 reward model, 2 RL)."""
        return 2 if self.is_rl else int(self.is_reward_model)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs in some folders, sorted by stage and name.

    Logs of one CSVLogger (`version_0`, `version_1`, …) are one run if each begins at a later step than the one before:
    it resumed from a checkpoint. One that begins anew is another run, and only the newest is taken; to overlay them,
    name the version folders.

    Args:
        folders: each holds `metrics.csv`, `rollouts.jsonl` or `samples.jsonl`, anywhere below it.

    Raises:
        ValueError: a folder holds none of them, or a log can't be read; names file and line.
    """
    places = [place for folder in dict.fromkeys(Path(folder) for folder in folders) for place in find_places(folder)]
    runs = [_read(place, name) for place, name in zip(places, names_of(places), strict=True)]
    runs.sort(key=lambda run: (run.stage, run.name))
    return [replace(run, color=color(place)) for place, run in enumerate(runs)]


def _read(place: Place, name: str) -> Run:
    logs, older = _chain(place.logs)
    skipped = {path.parent for path in older}
    files = {
        kind: [path for path in place.others if path.name == kind and path.parent not in skipped] for kind in OTHERS
    }
    begun = [path.stat().st_mtime for path in (files["config.yaml"] or files["hparams.yaml"])[:1]]
    ended = [path.stat().st_mtime for path in logs[-1:]]
    notes = [
        f"{name}: {path} is left out, an older run in the same folder; name its folder to see it" for path in older
    ]
    if len(logs) > 1:
        notes.append(
            f"{name}: joined from {', '.join(path.parent.name for path in logs)}, which go on from checkpoints"
        )
    return Run(
        name=name,
        metrics=read_metrics(logs),
        rollouts=read_rollouts(files["rollouts.jsonl"]),
        samples=read_samples(files["samples.jsonl"]),
        settings=read_settings(files["config.yaml"], files["hparams.yaml"]),
        written=(begun[0], ended[0]) if begun and ended else None,
        notes=tuple(notes),
    )


def _chain(logs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split logs into those of the newest run and those of older ones."""
    chain: list[Path] = []
    older: list[Path] = []
    began = math.inf
    for path in logs:
        first = first_step(path)
        if chain and not first > began:
            older, chain = older + chain, []
        chain.append(path)
        began = first
    return chain, older
