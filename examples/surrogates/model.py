"""The grid on a language model: SmolLM2-135M through `PPOModule` and `Trainer`, the reward VADER of the response.

The policy at the start is the reference, the prompts are the quickstart's, and reward and KL at the end are those of
the module's own validation on held-out prompts. A finished run is written at once: an interrupted study resumes.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time

import torch
from grid import HELD_OUT, NAMES, Scale, append, read
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf import ModelSource, PPOModule, PromptDataModule, SamplingParams, UpdateSchedule
from lightning_rlhf.core import Algorithm, BanditAdvantage, BatchMean, ConstantSchedule, FixedKL

Settings = tuple[str, float, int]
"""Surrogate, beta, inner epochs."""
QUICKSTART = Path(__file__).parent.parent / "quickstart"
SCALE = Scale(beta=0.1, b=1.0, target=0.05)
LOGGED = {
    "train_reward": "objective/scores",
    "train_kl": "objective/kl",
    "approxkl": "policy/approxkl_avg",
    "ratio_var": "policy/ratio_var",
    "clipfrac": "policy/clipfrac_avg",
    "b": "surrogate/coef",
}
MEASURED = {"reward": "eval/reward", "kl": "eval/kl", "entropy": "eval/entropy", "length": "eval/response_length"}
COLUMNS = ("surrogate", "beta", "epochs", "lr", "rollout", *MEASURED, *LOGGED, "cpu_seconds")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What is trained, and on what."""

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    reward: Callable[..., list[float]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is run."""

    rollouts: int = 5
    prompts: int = 16
    """To a rollout, one response each."""
    minibatch: int = 8
    held_out: int = HELD_OUT
    tokens: int = 16
    """Longest response."""
    lr: float = 3e-5
    precision: str = "bf16-mixed"


def smollm2() -> Material:
    """SmolLM2-135M-Instruct out of its PyPI package, the quickstart's prompts and labeler."""
    sys.path.append(str(QUICKSTART))
    from ingredients import FORMS, vader
    from ingredients import smollm2 as gguf_of_smollm2

    gguf = gguf_of_smollm2()
    source = ModelSource(path=str(gguf.parent), gguf_file=gguf.name, attention="eager")
    topics = (QUICKSTART / "topics.txt").read_text(encoding="utf-8").split("\n")
    prompts = [FORMS[i % len(FORMS)].format(topic) + "\n" for i, topic in enumerate(filter(None, topics))]
    random.Random(0).shuffle(prompts)
    return Material(network=source.causal_lm(), tokenizer=source.tokenizer(), prompts=prompts, reward=vader)


class Record(Callback):
    """What the module logged, rollout by rollout."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        found = trainer.callback_metrics
        self.rows.append({ours: float(found[name]) for ours, name in LOGGED.items() if name in found})


def module_of(material: Material, size: Size, name: str, beta: float, epochs: int) -> PPOModule:
    """A run of the grid, on a fresh copy of the network."""
    adam = partial(torch.optim.AdamW, lr=size.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    return PPOModule(
        policy=copy.deepcopy(material.network),
        tokenizer=material.tokenizer,
        reward=material.reward,
        generation=SamplingParams(max_new_tokens=size.tokens, temperature=0.7),
        updates=UpdateSchedule(epochs=epochs, minibatch=size.minibatch),
        algorithm=Algorithm(
            beta=FixedKL(coef=beta),
            advantage=BanditAdvantage(baseline=BatchMean()),
            surrogate=SCALE.surrogate(name),
            shaping=(),
        ),
        optimizer=adam,
        schedule=ConstantSchedule(),
    )


def prompts_of(material: Material, size: Size, folder: Path) -> PromptDataModule:
    """Held-out prompts are the first, those to train on the rest."""
    files = {"val": material.prompts[: size.held_out], "train": material.prompts[size.held_out :]}
    paths = {name: folder / f"prompts_{name}.jsonl" for name in files}
    for name, prompts in files.items():
        paths[name].write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    named = {name: str(path) for name, path in paths.items()}
    return PromptDataModule(**named, batch_size=size.prompts, eval_batch_size=size.held_out)


def quiet(size: Size, **options: object) -> Trainer:
    """A trainer that writes nothing."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, precision=size.precision, **off, **options)


def measured(module: PPOModule, size: Size, data: PromptDataModule) -> dict[str, float]:
    """What validation on the held-out prompts finds."""
    (found,) = quiet(size).validate(module, data, verbose=False)
    return {ours: found[name] for ours, name in MEASURED.items()}


def trained(material: Material, size: Size, data: PromptDataModule, settings: Settings) -> list[dict[str, object]]:
    """A row for every rollout, as the policy was before its updates; the last row is the policy at the end."""
    start, record = process_time(), Record()
    module = module_of(material, size, *settings)
    options = {"max_epochs": 1, "limit_train_batches": size.rollouts, "limit_val_batches": 0, "callbacks": [record]}
    quiet(size, **options).fit(module, data)
    end = measured(module, size, data) | {"cpu_seconds": process_time() - start}
    names = dict(zip(("surrogate", "beta", "epochs"), settings, strict=True))
    names["lr"] = size.lr
    return [names | {"rollout": done} | row for done, row in enumerate([*record.rows, end])]


def study(path: Path, material: Callable[[], Material], size: Size) -> None:
    """Run what the CSV file does not hold yet: the policy at the start, and the grid."""
    done = {(row["surrogate"], float(row["beta"]), int(row["epochs"])) for row in read(path) if row["reward"]}
    start = ("start", 0.0, 0)
    todo = [settings for settings in [start, *SCALE.runs()] if settings not in done]
    if not todo:
        return
    loaded = material()
    data = prompts_of(loaded, size, path.parent)
    for settings in todo:
        seed_everything(0, verbose=False)
        if settings == start:
            module = module_of(loaded, size, NAMES[0], 0.0, 1)
            names = dict(zip(("surrogate", "beta", "epochs", "lr"), (*start, 0.0), strict=True))
            rows = [names | measured(module, size, data)]
        else:
            rows = trained(loaded, size, data, settings)
        append(path, COLUMNS, rows)
        print("model", *settings, {name: round(float(rows[-1][name]), 3) for name in ("reward", "kl")}, flush=True)
