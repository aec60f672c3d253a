"""Seven failures of RLHF, each made on purpose, and the same runs with their guards.

Each is a random GPT-2 of 18 tokens, trained for a few seconds on one core.

    python examples/failures/run.py [NAME ...]
"""

from __future__ import annotations

import csv
import logging
import shutil
import warnings
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from failure_cases import FAILURES, WITHOUT, Failure
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from panels import plot
from toy_task import network, prompts, tokenizer

from lightning_rlhf import PPOModule, PromptDataModule, RolloutLog, RunCheckpoint, UpdateSchedule
from lightning_rlhf.core import ConstantSchedule

RUNS, PROMPTS = Path("runs/failures"), 8


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended.

    Attributes:
        values: of the failure's metric, by the number of updates before it was measured.
        beside: the same of its other metrics.
        stopped: what ended the run early; empty if nothing did.
    """

    values: dict[int, float]
    beside: dict[str, dict[int, float]]
    stopped: str

    def first(self, failure: Failure) -> int | None:
        """Return the updates after which the metric first lay beyond the threshold, None if it never did."""
        return next((updates for updates, value in self.values.items() if failure.failed(value)), None)

    @property
    def last(self) -> float:
        """The mean of the metric's last five values."""
        values = list(self.values.values())[-5:]
        return sum(values) / len(values)


def train(name: str, guard: str = WITHOUT, *, rollouts: int | None = None, runs: Path = RUNS, seed: int = 0) -> Ending:
    """Run a failure, with a guard or without one, into a folder of its own.

    Args:
        name: of the failure.
        guard: one of the failure's `runs`.
        rollouts: how many; None for the failure's.
        runs: folder of all runs.
        seed: of network, prompts and sampling.
    """
    failure, folder = FAILURES[name], runs / name / guard
    length = rollouts or failure.rollouts
    shutil.rmtree(folder, ignore_errors=True)
    seed_everything(seed, verbose=False)
    settings: dict[str, Any] = failure.broken() | failure.runs[guard]()
    callbacks = [RolloutLog(), *settings.pop("callbacks", [])]
    options: dict[str, Any] = {"schedule": ConstantSchedule(warmup=0)} | settings
    updates, validates = options.get("updates", UpdateSchedule()), "evaluations" in options
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=length * updates.steps(PROMPTS * options["generation"].samples_per_prompt),
        max_epochs=-1,
        callbacks=callbacks,
        logger=CSVLogger(folder, name=None),
        default_root_dir=folder,
        log_every_n_steps=1,
        limit_val_batches=1.0 if validates else 0,
        val_check_interval=5 if validates else None,
        check_val_every_n_epoch=None if validates else 1,
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, RunCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PPOModule(network(seed), tokenizer=tokenizer(), **options)
    stopped = ""
    data = PromptDataModule(train=prompts(), val=prompts(), batch_size=PROMPTS, eval_batch_size=128)
    try:
        trainer.fit(module, data)
    except RuntimeError as error:  # of a guard, or an engine's
        stopped = str(error)
    if not stopped and module.iteration < length:
        stopped = f"EarlyStopping after {module.iteration}"
    beside = {metric: values_of(folder, metric) for metric in failure.beside}
    return Ending(values=values_of(folder, failure.metric), beside=beside, stopped=stopped)


def values_of(folder: Path, metric: str) -> dict[int, float]:
    """Read a metric from a run's log, by the number of updates before it was measured."""
    (log,) = folder.glob("version_*/metrics.csv")
    values, updates = {}, 0
    with log.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get(metric):
                values[updates] = float(row[metric])
            updates += bool(row.get("objective/scores"))
    return values


def row_of(name: str, guard: str, ending: Ending) -> dict[str, Any]:
    """One line of the table."""
    failure = FAILURES[name]
    return {
        "failure": name,
        "first metric": failure.metric,
        "threshold": failure.threshold,
        "run": guard,
        "at rollout": "never" if ending.first(failure) is None else ending.first(failure),
        "last value": round(ending.last, 3),
        "stopped": ending.stopped.partition(":")[0] if ending.stopped else "",
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAILURES)}; none for all")
    parser.add_argument("--seed", type=int, default=0, help="of networks, prompts and sampling")
    given = parser.parse_args()
    names = given.names or list(FAILURES)
    unknown = [name for name in names if name not in FAILURES]
    if unknown:
        parser.error(f"there is no failure {unknown[0]}: take one of {', '.join(FAILURES)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning_rlhf", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    endings = {(name, guard): train(name, guard, seed=given.seed) for name in names for guard in FAILURES[name].runs}
    write(endings)


def write(endings: dict[tuple[str, str], Ending], runs: Path = RUNS) -> None:
    """Print the table, and write it, the curves and a picture of them."""
    rows = [row_of(name, guard, ending) for (name, guard), ending in endings.items()]
    for row in rows:
        print(" | ".join(str(cell) for cell in row.values()))
    points = [
        {"failure": name, "run": guard, "metric": metric, "rollout": rollout, "value": round(value, 4)}
        for (name, guard), ending in endings.items()
        for metric, values in ({FAILURES[name].metric: ending.values} | ending.beside).items()
        for rollout, value in values.items()
    ]
    for table, lines in {"table.csv": rows, "curves.csv": points}.items():
        with (runs / table).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    plot(points, {name: FAILURES[name] for name, _ in endings}, runs / "failures.png")
    print(f"{runs / 'table.csv'}, {runs / 'curves.csv'} and {runs / 'failures.png'}")


if __name__ == "__main__":
    main()
