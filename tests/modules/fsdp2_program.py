"""More jobs of `ddp_host`, for four processes and low precision: `python fsdp2_program.py FOLDER JOB...`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import ddp_host
import ddp_program as program
import torch
from ddp_program import ADAM, GLOO, Table, run, source
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from counted_reads import READERS, counting

from lightning_rlhf import (
    ComparisonDataModule,
    DemonstrationDataModule,
    GradientNorms,
    LearnedReward,
    ModelSource,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SamplingParams,
    SFTModule,
    UpdateSchedule,
)
from lightning_rlhf.core import (
    GAE,
    AdaptiveKL,
    Algorithm,
    ConstantSchedule,
    FixedKL,
    ImportanceSampling,
    TokenLevel,
    Whitened,
)

STRATEGIES = {
    "low": lambda devices: "auto",
    "low_fsdp2": program.STRATEGIES["fsdp2"],
    "one_file": lambda devices: ModelParallelStrategy(devices, 1, save_distributed_checkpoint=False, **GLOO),
}


def prompts(folder: Path, batch_size: int, **options) -> PromptDataModule:
    """With pretraining texts."""
    path, texts = str(folder / "prompts.jsonl"), str(folder / "texts.jsonl")
    given = {"batch_size": batch_size, "pretrain": texts, "pretrain_ratio": 1.0, "text_tokens": 8}
    return PromptDataModule(train=path, val=path, **(given | options))


def wide(folder: Path, devices: int) -> dict:
    """PPO-ptx with everything: a value network, a learned reward, two responses to each prompt, ragged pieces."""
    read: Counter = Counter()
    for reader in READERS:
        reader.safe_open = counting(read)
    module = PPOModule(
        policy=source(folder, "lm"),
        reward=LearnedReward(str(folder / "scorer"), dtype="float64"),
        value=source(folder, "scorer"),
        generation=SamplingParams(max_new_tokens=4, samples_per_prompt=2),
        updates=UpdateSchedule(minibatch=8 // devices, microbatch_tokens=18),
        algorithm=Algorithm(
            level=TokenLevel(), advantage=Whitened(estimator=GAE()), beta=FixedKL(coef=0.1), ptx_coef=0.3
        ),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    data = prompts(folder, 8 // devices)
    found = run(module, data, devices, max_epochs=1, callbacks=[GradientNorms()])
    return found | {"read": module.all_gather(torch.tensor(read["numbers"])).flatten(), "n": module.episodes}


def stages(folder: Path, devices: int, **precision) -> dict:
    """Every stage in a precision, by name; of PPO one rollout, since a second would follow the first's rounding."""
    ranked, told = str(folder / "comparisons.jsonl"), str(folder / "demonstrations.jsonl")
    options = precision | {"max_epochs": 1}
    found = {}
    sft = SFTModule(low(folder, "lm"), optimizer=ADAM)
    data = DemonstrationDataModule(train=told, val=told, batch_size=4 // devices)
    found["sft"] = run(sft, data, devices, **options)
    reward = RewardModule(low(folder, "scorer"), optimizer=ADAM)
    data = ComparisonDataModule(train=ranked, val=ranked, demonstrations=told, batch_size=4 // devices)
    found["reward"] = run(reward, data, devices, **options) | {"bias": reward.model.bias}
    ppo = PPOModule(
        policy=low(folder, "lm"),
        reward=Table(),
        generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
        updates=UpdateSchedule(epochs=2),
        algorithm=Algorithm(surrogate=ImportanceSampling(), ptx_coef=0.3),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    found["ppo"] = run(
        ppo, prompts(folder, 4 // devices), devices, limit_train_batches=1, limit_val_batches=0, **options
    )
    return found


def low(folder: Path, name: str) -> ModelSource:
    """Its precision is the trainer's."""
    return ModelSource(path=str(folder / name))


def single(folder: Path, devices: int) -> dict:
    return stages(folder, devices, precision="32-true")


def mixed(folder: Path, devices: int) -> dict:
    return stages(folder, devices, precision="bf16-mixed")


def true(folder: Path, devices: int) -> dict:
    return stages(folder, devices, precision="bf16-true")


def stopped(folder: Path, devices: int) -> dict:
    """Two rollouts of PPO without a stop between them, and with one."""
    path, found = str(folder / f"{program.strategy}.ckpt"), {}
    for name, options in {
        "whole": {"max_epochs": 2},
        "first": {"max_epochs": 1, "checkpoint": path},
        "resumed": {"max_epochs": 2, "ckpt_path": path},
    }.items():
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=Table(),
            generation=SamplingParams(max_new_tokens=4),
            algorithm=Algorithm(beta=AdaptiveKL(coef=0.2, target=0.01, horizon=60.0)),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
        )
        data = PromptDataModule(train=str(folder / "prompts.jsonl"), batch_size=4 // devices)
        found[name] = run(module, data, devices, limit_train_batches=1, **options) | {"kl": module.algorithm.kl.coef}
    return found


def alone(folder: Path, devices: int) -> dict:
    """`validate` of every stage, without a fit before it."""
    ranked, told = str(folder / "comparisons.jsonl"), str(folder / "demonstrations.jsonl")
    ppo = PPOModule(
        policy=source(folder, "lm"),
        reward=LearnedReward(str(folder / "scorer"), dtype="float64"),
        generation=SamplingParams(max_new_tokens=6),
    )
    jobs = {
        "sft": (SFTModule(source(folder, "lm")), DemonstrationDataModule(told, val=told, batch_size=4 // devices)),
        "reward": (
            RewardModule(source(folder, "scorer")),
            ComparisonDataModule(ranked, val=ranked, batch_size=4 // devices),
        ),
        "ppo": (ppo, prompts(folder, 4 // devices)),
    }
    found = {}
    for name, (module, data) in jobs.items():
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=program.STRATEGIES[program.strategy](devices),
            plugins=[DoublePrecision()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        found[name] = trainer.validate(module, data, verbose=False)[0]
    return found


program.STRATEGIES.update(STRATEGIES)
program.IN_FLOAT32 += ("low", "low_fsdp2")  # no plugin: the precision is the trainer's
vars(program).update({job.__name__: job for job in (wide, single, mixed, true, stopped, alone)})

if __name__ == "__main__":
    ddp_host.main()
