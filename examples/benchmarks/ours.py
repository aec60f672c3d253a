"""Our side: `PPOModule` in Lightning's `Trainer`, RLOO's objective. Started by the commands, one process."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from models import Ending, held, vader, waiter
from torch import nn
from turns import Turns
from work import Work

from lightning_rlhf import RLOO, ModelSource, PPOModule, PromptDataModule, SamplingParams, UpdateSchedule
from lightning_rlhf.core import ConstantSchedule


def ended(
    decode: Callable[..., Any], network: nn.Module, *inputs: Any, probability: float | None, **options: Any
) -> Any:
    """Decode with the network's end token at a given probability: the copy that samples is made anew every rollout."""
    Ending.put_on(network, probability)
    return decode(network, *inputs, **options)


class Baton(Callback):
    """A turn is what lies between the starts of two batches: nothing of the trainer's own work is left out."""

    def __init__(self, work: Work) -> None:
        self.work, self.found = work, {}
        self.turns = Turns(waiter(work.device))

    def on_fit_start(self, trainer: Trainer, module: PPOModule) -> None:
        engine = module.engine
        engine.load(module.policy, version=0)
        engine.decode = partial(ended, engine.decode, probability=self.work.end)

    def on_train_batch_start(self, *_: object) -> None:
        self.turns.next(self.found)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        phases = {name.removeprefix("time/"): value for name, value in logged.items() if name.startswith("time/")}
        produced = logged["objective/response_length"] * self.work.responses
        self.found = phases | held(self.work.device) | {"score": logged["objective/scores"], "tokens": produced}

    def on_train_end(self, *_: object) -> None:
        self.turns.next(self.found)


def module_of(work: Work) -> PPOModule:
    """RLOO: leave-one-out baseline, the KL to the reference in the reward, no clipping needed in one inner epoch."""
    adam = partial(torch.optim.AdamW, lr=work.lr, weight_decay=0.0)
    sizes = {"max_new_tokens": work.tokens, "samples_per_prompt": work.samples, "seed": work.seed}
    return PPOModule(
        policy=ModelSource(path=work.folder, attention=work.attention),
        reward=vader,
        algorithm=RLOO(beta=work.beta, shaping=(), **work.options("algorithm")),
        generation=SamplingParams(**sizes, **work.options("generation")),
        updates=UpdateSchedule(**work.options("updates")),
        optimizer=adam,
        schedule=ConstantSchedule(),
        **work.options(),
    )


def main(work: Work) -> None:
    seed_everything(work.seed, verbose=False)
    prompts = str(Path(work.folder) / "prompts.jsonl")
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {"max_steps": work.steps, "max_epochs": -1}
    options = {"accelerator": work.device, "devices": 1, "precision": work.precision, **limits, **off}
    trainer = Trainer(callbacks=[Baton(work)], **options)
    trainer.fit(module_of(work), PromptDataModule(train=prompts, batch_size=work.prompts, seed=work.seed))


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    main(Work(**json.loads(sys.argv[1])))
