"""Standard callbacks and logger of the command line, each with a key of the config."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.callbacks import (
    Export,
    NonFiniteGuard,
    PredictionWriter,
    Preflight,
    RolloutLog,
    RolloutProgress,
    RunCheckpoint,
    SampleLog,
)
from lightning_rlhf.cli.help import OPTIONAL

RUN = "runs/run"
"""Default folder of a run."""
STANDARD: dict[str, tuple[type[Callback], str]] = {
    "preflight": (Preflight, "Checks before the first update."),
    "export": (Export, "The trained model as a Hugging Face folder, `model` in the run's folder."),
    "nonfinite": (NonFiniteGuard, "Leaves out updates whose gradients are not finite."),
    "rollouts": (RolloutLog, "Every training response, in `rollouts.jsonl`."),
    "progress": (RolloutProgress, "Responses and tokens per second on the progress bar."),
    "checkpoint": (RunCheckpoint, "Checkpoints to resume from, in `checkpoints` of the run's folder."),
    "samples": (SampleLog, "Responses to the held-out prompts, in `samples.jsonl`."),
    "predictions": (PredictionWriter, "Responses of `predict`, in `responses.jsonl`."),
}
"""Standard callbacks with their help by key; they act in the stages that concern them."""


def add_standard(parser: LightningArgumentParser) -> None:
    """Add a key for each callback: its arguments, or another class or null in its place."""
    for key, (callback, text) in STANDARD.items():
        default = {"class_path": f"{callback.__module__}.{callback.__name__}"}
        parser.add_argument(f"--{key}", type=callback | None, default=default, help=f"{text} {OPTIONAL}")
    parser.set_defaults({"trainer.default_root_dir": RUN, "trainer.log_every_n_steps": 1})


def with_standard(trainer: dict[str, Any], callbacks: list[Callback], module: LightningModule) -> dict[str, Any]:
    """Add the standard callbacks and logger to the trainer's arguments if the user gave none of the kind.

    Args:
        trainer: its arguments, with objects for classes.
        callbacks: standard ones that were not left out.
        module: to be trained.
    """
    own = trainer.get("callbacks") or []
    own = own if isinstance(own, list) else [own]
    unwanted: tuple[type[Callback], ...] = tuple(type(callback) for callback in own)
    if trainer.get("enable_checkpointing") is False:
        unwanted += (RunCheckpoint,)
    if not hasattr(module, "save_pretrained"):
        unwanted += (Export,)
    standard = [callback for callback in callbacks if not isinstance(callback, unwanted)]
    logger = trainer.get("logger")
    if logger is None:
        logger = CSVLogger(trainer["default_root_dir"] or ".", name=None)
    every = [*own, *standard]
    if trainer.get("enable_checkpointing") is None and not any(isinstance(each, Checkpoint) for each in every):
        trainer = trainer | {"enable_checkpointing": False}  # otherwise Lightning adds one of its own
    return trainer | {"callbacks": every, "logger": logger}
