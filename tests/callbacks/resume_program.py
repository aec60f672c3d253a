"""Trains, is killed, goes on: `python resume_program.py FOLDER NAMES`.

FOLDER holds `lm` and the JSONL files. Each name is `DEVICES-KILL`; KILL says where the first run dies, or `never`.
`1to2` devices are one before that, and two afterwards.
What the last run ends with is `FOLDER/NAME/end-RANK.pt`. All runs are forks of one process, which imports once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from transformers import GPT2LMHeadModel  # noqa: F401  here, once for all forks

from lightning_rlhf import (
    EMA,
    ModelSource,
    PPOModule,
    PromptDataModule,
    RunCheckpoint,
    SamplingParams,
    UpdateSchedule,
)
from lightning_rlhf.callbacks import checked_io
from lightning_rlhf.callbacks import checkpoint as checkpoint_room
from lightning_rlhf.core import AdaptiveKL, Algorithm, BanditAdvantage, KLPen, LinearSchedule, RunningMean

DEATH = 4  # rollouts that were finished before: the second of the second epoch, of three each


def letters(prompts, responses):
    """From 0 to 1 by the last letter."""
    return [(ord(response[-1]) - 97) / 26 if response else 0.0 for response in responses]


POLITE = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}


def die() -> None:
    """All processes of the run at once, as a scheduler kills them."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


class Watch(Callback):
    """Kills the process at the place named, and keeps what it saw and ends with."""

    def __init__(self, kill: str, folder: Path) -> None:
        self.kill, self.folder, self.seen, self.steps = kill, folder, [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((pl_module.iteration, batch["prompts"].tokens.clone(), batch["pretrain"].tokens.clone()))
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        if self.kill == "minibatch" and pl_module.iteration == DEATH and self.steps == 3:
            self._last_dies(trainer)

    def on_train_start(self, trainer, pl_module):
        score, save, rename = pl_module.score, checked_io.write, checkpoint_room.rename

        def scored(*args):
            if self.kill == "rollout" and pl_module.iteration == DEATH:
                self._last_dies(trainer)
            if self.kill in POLITE and pl_module.iteration == DEATH and trainer.is_global_zero:
                os.killpg(os.getpgrp(), POLITE[self.kill])  # data workers get it as well, as from a terminal
            return score(*args)

        def saved(checkpoint, path):
            save(checkpoint, path)
            if self.kill == "write" and pl_module.iteration == DEATH + 1:
                os.truncate(path, Path(path).stat().st_size // 2)
                die()

        def renamed(path, name):
            rename(path, name)
            if self.kill == "rename" and pl_module.iteration == DEATH + 1:
                die()

        pl_module.score, checked_io.write, checkpoint_room.rename = scored, saved, renamed

    def on_train_end(self, trainer, pl_module):
        found = {
            "weights": dict(pl_module.state_dict()),
            "adam": trainer.optimizers[0].state_dict(),
            "average": next(c for c in trainer.callbacks if isinstance(c, EMA)).average,
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict()["_last_lr"],
            "numbers": [
                pl_module.algorithm.kl.coef,
                pl_module.algorithm.surrogate.coef,
                pl_module.iteration,
                pl_module.episodes,
            ],
            "baseline": pl_module.algorithm.advantage.state(),
            "global_step": trainer.global_step,
            "position": trainer.train_dataloader.state_dict(),
            "seen": self.seen,
        }
        torch.save(found, self.folder / f"end-{trainer.global_rank}.pt")

    def _last_dies(self, trainer) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            die()


def train(data: Path, folder: Path, devices: int, kill: str, ckpt_path: str | None) -> None:
    signal.alarm(60)  # nothing outlives a hang
    module = PPOModule(
        policy=ModelSource(path=str(data / "lm"), dtype="float64"),
        reward=letters,
        generation=SamplingParams(max_new_tokens=3),
        updates=UpdateSchedule(epochs=2, minibatch=4 // devices),
        algorithm=Algorithm(
            beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0),
            surrogate=KLPen(coef=1.0, target=1e-3),
            advantage=BanditAdvantage(baseline=RunningMean(decay=0.5)),
            ptx_coef=0.3,
        ),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=LinearSchedule(),
    )
    prompts = PromptDataModule(
        train=str(data / "prompts.jsonl"),
        pretrain=str(data / "texts.jsonl"),
        batch_size=8 // devices,
        pretrain_ratio=0.5,
        text_tokens=8,
        num_workers=1,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        precision="64-true",
        logger=False,
        max_epochs=2,
        callbacks=[EMA(decay=0.9), Watch(kill, folder), RunCheckpoint(str(folder / "checkpoints"), every_n_batches=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, prompts, ckpt_path=ckpt_path)


def forked(*arguments) -> int:
    """`train` in a process group of its own; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.setpgrp()
        try:
            train(*arguments)
        except SystemExit as left:
            os._exit(left.code)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # whose first call imports the compiler
    data = Path(sys.argv[1])
    for name in sys.argv[2].split(","):
        devices, kill = name.split("-")
        first, _, last = devices.partition("to")
        folder = data / name
        folder.mkdir()
        if kill != "never":
            status = forked(data, folder, int(first), kill, None)
            assert not list(folder.glob("end-*")), "it was to die"
            left = sorted(path.name for path in (folder / "checkpoints").iterdir())
            (folder / "left.txt").write_text("\n".join(left))
            (folder / "status.txt").write_text(str(status))
        forked(data, folder, int(last or first), "never", None if kill == "never" else "last")


if __name__ == "__main__":
    main()
