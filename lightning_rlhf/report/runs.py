"""What the files of a run hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rlhf.report.metrics import Metrics, first_step, read_metrics
from lightning_rlhf.report.places import Place, find_places, names_of
from lightning_rlhf.report.responses import Responses, read_rollouts, read_samples
from lightning_rlhf.report.settings import read_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is known of one run.

    Attributes:
        name: in legends.
        metrics: of `metrics.csv`.
        rollouts: of `rollouts.jsonl`; empty where there is none.
        samples: of `samples.jsonl`, by stage; empty where there is none.
        settings: of `config.yaml`, dotted key → value.
        notes: what a reader of the report must know of how the files were read.
    """

    name: str
    metrics: Metrics = field(default_factory=Metrics)
    rollouts: Responses = field(default_factory=Responses)
    samples: Mapping[str, Responses] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def held_out(self) -> Responses:
        """Samples of validation, or of the test where there is no validation."""
        return self.samples.get("val") or self.samples.get("test") or Responses()

    @property
    def is_reward_model(self) -> bool:
        """Whether it trained a reward model."""
        return bool(self.metrics.first("eval/accuracy", "eval/margin", "test/accuracy"))

    @property
    def is_rl(self) -> bool:
        """Whether it trained a policy on a reward."""
        scored = self.metrics.first("objective/scores", "eval/reward", "test/reward")
        return bool(scored or self.rollouts.numbers or self.samples)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in some folders, named by folder.

    Logs of one CSVLogger (`version_0`, `version_1`, …) are one run where each begins at a later step than the one
    before began: it went on from a checkpoint. One that begins anew is another run, and only the newest is taken; to
    overlay them, name the version folders.

    Args:
        folders: each holds `metrics.csv`, `rollouts.jsonl` or `samples.jsonl`, anywhere below it.

    Raises:
        ValueError: a folder holds none of them, or what it holds can't be read; names file and line.
    """
    places = [place for folder in dict.fromkeys(Path(folder) for folder in folders) for place in find_places(folder)]
    return [_read(place, name) for place, name in zip(places, names_of(places), strict=True)]


def _read(place: Place, name: str) -> Run:
    logs, older = _chain(place.logs)
    gone = {path.parent for path in older}
    found = {
        kind: [path for path in place.others if path.name == kind and path.parent not in gone]
        for kind in ("rollouts.jsonl", "samples.jsonl", "config.yaml")
    }
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
        rollouts=read_rollouts(found["rollouts.jsonl"]),
        samples=read_samples(found["samples.jsonl"]),
        settings=read_settings(found["config.yaml"][-1:]),
        notes=tuple(notes),
    )


def _chain(logs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The logs of the newest run, and those of older ones."""
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
