"""Strategies that ask for a GPU, on a CPU, and stages of their own beside those of `ddp_program`, all in float32."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from ddp_program import ADAM, GLOO, STRATEGIES, Table, source, trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_rlhf import (
    ComparisonDataModule,
    DemonstrationDataModule,
    PPOModule,
    PromptDataModule,
    RewardModule,
    SamplingParams,
    SFTModule,
    UpdateSchedule,
)
from lightning_rlhf.callbacks import NonFiniteGuard
from lightning_rlhf.core import GAE, Algorithm, ConstantSchedule, FixedKL, TokenLevel, Whitened
from lightning_rlhf.models.replica import whole_tensor


class CPUFSDP(FSDPStrategy):
    """FSDP1, which asks for a GPU, on a CPU: the same wrapper told its device."""

    def _setup_model(self, model):
        options = {"sharding_strategy": self.sharding_strategy, "mixed_precision": self.mixed_precision_config}
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options, **self.kwargs)


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed without the checks that want a GPU."""

    def setup_environment(self):
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def ready_deepspeed() -> None:
    """Import what an engine imports when it is made, and have engines on a CPU."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # and with it the compiler

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its collectives for CPUs, to be compiled
    deepspeed.initialize = partial(_initialize, deepspeed.initialize)


def _initialize(initialize, args=None, **given):
    """Lightning passes the number of the GPU, here None."""
    return initialize(args=argparse.Namespace(device_rank=int(os.environ["LOCAL_RANK"])), **given)


def zero_config(stage: int) -> dict:
    """No weight is too small to be sharded or stays for its next use, no bucket holds all gradients."""
    sizes = {"reduce_bucket_size": 2000, "allgather_bucket_size": 2000}
    sizes |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **sizes},
        "train_micro_batch_size_per_gpu": 4,
    }


def zero(stage: int) -> CPUDeepSpeed:
    return CPUDeepSpeed(config=zero_config(stage), **GLOO)


STRATEGIES |= {
    "fsdp1": lambda devices: CPUFSDP(state_dict_type="sharded", **GLOO),
    "zero2": lambda devices: zero(2),
    "zero3": lambda devices: zero(3),
}


def everything(folder: Path, devices: int) -> tuple[PPOModule, PromptDataModule]:
    """PPO with PTX, a value network and two responses to each prompt."""
    module = PPOModule(
        policy=source(folder, "lm"),
        reward=Table(),
        value=source(folder, "scorer"),
        generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
        updates=UpdateSchedule(epochs=2),
        algorithm=Algorithm(
            level=TokenLevel(), advantage=Whitened(estimator=GAE()), beta=FixedKL(coef=0.1), ptx_coef=0.3
        ),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    path, texts = str(folder / "prompts.jsonl"), str(folder / "texts.jsonl")
    data = PromptDataModule(
        train=path, val=path, pretrain=texts, batch_size=8 // devices, pretrain_ratio=1.0, text_tokens=8
    )
    return module, data


def validated(folder: Path, devices: int) -> dict:
    """Validation by itself, for which there is no optimizer: PPO with everything, and a reward model."""
    ppo, prompts = everything(folder, devices)
    scores = RewardModule(source(folder, "scorer"))
    path, demonstrations = str(folder / "comparisons.jsonl"), str(folder / "demonstrations.jsonl")
    comparisons = ComparisonDataModule(train=path, val=path, demonstrations=demonstrations, batch_size=4 // devices)
    found = {}
    for module, data in ((ppo, prompts), (scores, comparisons)):
        validator = trainer(devices)
        validator.validate(module, data, verbose=False)
        found |= {name: float(value) for name, value in validator.callback_metrics.items()}
    return found | {"bias": scores.model.bias}


class Poisoned(SFTModule):
    """The losses of every second batch are NaN."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1.0)


def poisoned(folder: Path, devices: int) -> dict:
    """Three epochs, each with a step to leave out, of which two may be."""
    path = str(folder / "demonstrations.jsonl")
    data = DemonstrationDataModule(train=path, batch_size=4 // devices)
    module = Poisoned(source(folder, "lm"), optimizer=ADAM)
    guard = NonFiniteGuard(limit=2, folder=str(folder / f"nonfinite-{devices}"))
    fitter = trainer(devices, callbacks=[guard], max_epochs=3)
    with pytest.raises(RuntimeError, match="are not finite, and 2 such steps were left out already"):
        fitter.fit(module, data)
    weights = torch.cat([whole_tensor(p).flatten() for p in module.parameters()])
    return {"weights": weights, "batches": fitter.fit_loop.total_batch_idx}
