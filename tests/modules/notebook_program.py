"""Trains as a notebook does, in processes of its own, and exports afterwards: `python notebook_program.py FOLDER`."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from lightning_rlhf import (
    DemonstrationDataModule,
    ModelSource,
    PPOModule,
    PromptDataModule,
    SamplingParams,
    SFTModule,
)
from lightning_rlhf.core import ConstantSchedule


class Keep(Callback):
    """The weights with which training ended, from the process that has them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def letters(prompts, responses):
    return [float(len(response)) for response in responses]


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    source = ModelSource(path=str(folder / "lm"))
    adam = {"optimizer": partial(torch.optim.Adam, lr=0.01), "schedule": ConstantSchedule()}
    rows = {"train": str(folder / "rows.jsonl"), "batch_size": 2}
    runs = {
        "sft": (SFTModule(source, **adam), DemonstrationDataModule(**rows)),
        "ppo": (
            PPOModule(source, letters, generation=SamplingParams(max_new_tokens=2), **adam),
            PromptDataModule(**rows),
        ),
    }
    for name, (module, data) in runs.items():
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            callbacks=[Keep(folder / f"{name}.pt")],
        )
        trainer.fit(module, data)
        module.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
