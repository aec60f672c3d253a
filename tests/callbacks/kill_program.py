"""Trains every stage, is killed at random places, goes on: `python kill_program.py FOLDER STAGES SEED TRIALS`.

FOLDER holds `lm` and the JSONL files. Each trial is a run to its end without a kill, and the same run killed up to
three times; both are left in FOLDER/STAGE-TRIAL/{whole,killed}. All runs are forks of one process, which imports once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: F401  here, once for all forks

from lightning_rlhf import (
    EMA,
    ComparisonDataModule,
    DemonstrationDataModule,
    ModelSource,
    PPOModule,
    PromptDataModule,
    RewardModule,
    RolloutLog,
    RunCheckpoint,
    SampleLog,
    SamplingParams,
    SFTModule,
    UpdateSchedule,
)
from lightning_rlhf.core import AdaptiveKL, Algorithm

BOUNDARIES = (
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
)
HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_optimizer_step",
    "on_train_batch_end",
    *BOUNDARIES,
)
BATCHES = 4
"""Of an epoch, in every stage."""


class Killer(Callback):
    """Counts the hooks it is called in, and kills the process at one of them."""

    def __init__(self, at: int, folder: Path) -> None:
        self.at, self.folder, self.seen = at, folder, []

    def on_fit_end(self, trainer, pl_module):
        self.folder.joinpath("events.json").write_text(json.dumps(self.seen))


def _counted(hook):
    def call(self, trainer, *_, **__):
        if trainer.sanity_checking:
            return
        self.seen.append(hook)
        if len(self.seen) - 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    return call


for name in HOOKS:
    setattr(Killer, name, _counted(name))


class Ends(Callback):
    """Keeps what the run ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        saver = trainer.checkpoint_callback
        best = {Path(path).name: float(score) for path, score in sorted(saver.best_k_models.items())}
        end = {
            "weights": dict(pl_module.state_dict()),
            "adam": trainer.optimizers[0].state_dict(),
            "global_step": trainer.global_step,
            "best": best,
            "best weights": {name: torch.load(Path(saver.dirpath, name))["state_dict"] for name in best},
        }
        torch.save(end, self.folder / "end.pt")


def letters(prompts, responses):
    """From 0 to 1 by the last letter."""
    return [(ord(response[-1]) - 97) / 26 if response else 0.0 for response in responses]


def module_and_data(stage: str, data: Path):
    source = ModelSource(path=str(data / "lm"))
    adam = partial(torch.optim.AdamW, lr=0.01)
    common = {"batch_size": 4, "num_workers": 0}
    if stage == "sft":
        rows = {"train": str(data / "demonstrations.jsonl"), "val": str(data / "held_out.jsonl")}
        return SFTModule(source, optimizer=adam), DemonstrationDataModule(**rows, **common)
    if stage == "reward":
        rows = {"train": str(data / "rankings.jsonl"), "val": str(data / "rankings.jsonl")}
        rows |= {"demonstrations": str(data / "held_out.jsonl")}
        return RewardModule(source, optimizer=adam), ComparisonDataModule(**rows, **common)
    module = PPOModule(
        policy=source,
        reward=letters,
        generation=SamplingParams(max_new_tokens=3),
        updates=UpdateSchedule(epochs=2, minibatch=2),
        algorithm=Algorithm(beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0)),
        optimizer=adam,
    )
    rows = {"train": str(data / "prompts.jsonl"), "val": str(data / "held_out.jsonl")}
    return module, PromptDataModule(**rows, **common)


MONITORS = {"sft": ("eval/loss", "min"), "reward": ("eval/loss", "min"), "ppo": ("eval/reward", "max")}


def train(stage: str, data: Path, folder: Path, plan: dict, kill: int, ckpt_path: str | None) -> None:
    signal.alarm(60)  # nothing outlives a hang
    module, rows = module_and_data(stage, data)
    monitor, mode = MONITORS[stage]
    saver = RunCheckpoint(
        str(folder / "checkpoints"), every_n_batches=plan["every"], monitor=monitor, mode=mode, save_top_k=2
    )
    logs = [RolloutLog(str(folder)), SampleLog(str(folder))] if stage == "ppo" else []
    callbacks = [Killer(kill, folder), Ends(folder), EMA(decay=0.9), *logs, saver]
    random.Random(plan["order"]).shuffle(callbacks)  # a kill before and after the others' part of a hook
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(str(folder), name="logs"),
        log_every_n_steps=1,
        max_epochs=plan["epochs"],
        max_steps=plan["steps"],
        val_check_interval=plan["interval"],
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, rows, ckpt_path=ckpt_path)


def forked(*arguments) -> int:
    """`train` in a process of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        train(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trial(stage: str, data: Path, folder: Path, draw: random.Random) -> None:
    plan = {
        "epochs": draw.choice([1, 2, 3]),
        "every": draw.choice([1, 3, BATCHES]),
        "interval": draw.choice([1.0, 2]),
        "steps": draw.choice([-1, -1, -1, 6 if stage != "ppo" else 24]),
        "order": draw.random(),
    }
    whole, killed = folder / "whole", folder / "killed"
    for place in (whole, killed):
        place.mkdir(parents=True)
    assert forked(stage, data, whole, plan, -1, None) == 0
    events = json.loads((whole / "events.json").read_text())
    kills = []
    for life in range(draw.choice([1, 2, 3])):
        boundary = draw.random() < 0.6
        places = [place for place, hook in enumerate(events) if not boundary or hook in BOUNDARIES]
        kills.append(draw.choice(places) // (1 if life == 0 else 2))
        status = forked(stage, data, killed, plan, kills[-1], "last")
        assert status in (0, -signal.SIGKILL), status
    (folder / "plan.json").write_text(json.dumps(plan | {"kills": kills, "hooks": [events[k] for k in kills]}))
    for _ in range(2):  # and once more after the end
        assert forked(stage, data, killed, plan, -1, "last") == 0


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # whose first call imports the compiler
    data, stages, seed, trials = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
    for stage in stages:
        draw = random.Random(f"{stage}/{seed}")
        for number in range(trials):
            trial(stage, data, data / f"{stage}-{number}", draw)


if __name__ == "__main__":
    main()
