"""More jobs of `ddp_host`, whose strategies begin with `gpu`: `python gpu_program.py FOLDER JOB...`.

One process has the GPU to itself, over NCCL where the strategy has collectives; two replicas share it over gloo, since
NCCL wants a GPU for each. (FSDP2 cannot: torch makes no mesh of CUDA devices over gloo.)
"""

from __future__ import annotations

from pathlib import Path

import ddp_host
import ddp_program as program
import torch
from ddp_program import ADAM, GLOO, Table, run, source
from fsdp2_program import low, prompts, stages
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from standins import zero_config

from lightning_rlhf import DemonstrationDataModule, PPOModule, SamplingParams, SFTModule, UpdateSchedule
from lightning_rlhf.core import ConstantSchedule

STRATEGIES = {
    "gpu": lambda devices: "auto",
    "gpu_ddp": lambda devices: "ddp",
    "gpu_fsdp2": lambda devices: ModelParallelStrategy(devices, 1),
    "gpu_fsdp1": lambda devices: FSDPStrategy(state_dict_type="sharded"),
    "gpu_zero2": lambda devices: DeepSpeedStrategy(config=zero_config(2)),
    "gpu_zero3": lambda devices: DeepSpeedStrategy(config=zero_config(3)),
    "gpu_ddp_nodes": lambda devices: DDPStrategy(**GLOO),
    "gpu_low": lambda devices: "auto",
    "gpu_low_fsdp2": lambda devices: ModelParallelStrategy(devices, 1),
}


def start(folder: Path, devices: int) -> dict:
    """The weights that each stage begins with, in one row."""
    networks = {"sft": low(folder, "lm").causal_lm(), "reward": low(folder, "scorer").scorer(new_head=False)}
    networks["ppo"] = networks["sft"]
    return {name: torch.cat([p.detach().flatten() for p in net.parameters()]) for name, net in networks.items()}


def half(folder: Path, devices: int) -> dict:
    """With a scale that overflows nothing: the usual one, of 2^16, leaves out the first steps, as it is meant to."""
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    return stages(folder, devices, plugins=[MixedPrecision("16-mixed", "cuda", scaler)])


def scaled(folder: Path, devices: int) -> dict:
    """SFT with the usual scale: after as many steps as with another."""
    path = str(folder / "demonstrations.jsonl")
    module = SFTModule(low(folder, "lm"), optimizer=ADAM)
    data = DemonstrationDataModule(train=path, val=path, batch_size=4)
    return run(module, data, devices, precision="16-mixed")


def compiled(folder: Path, devices: int) -> dict:
    """PPO with its networks compiled, and as they are."""
    found = {}
    for name in ("plain", "compiled"):
        module = PPOModule(
            policy=source(folder, "lm"),
            reward=Table(),
            generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2),
            updates=UpdateSchedule(epochs=2),
            optimizer=ADAM,
            schedule=ConstantSchedule(),
            compile=name == "compiled",
        )
        torch.manual_seed(0)
        found[name] = run(module, prompts(folder, 4), devices, limit_train_batches=2, max_epochs=1)
    return found


program.STRATEGIES.update(STRATEGIES)
program.IN_FLOAT32 += ("gpu_fsdp1", "gpu_zero2", "gpu_zero3", "gpu_low", "gpu_low_fsdp2")
vars(program).update({job.__name__: job for job in (start, half, scaled, compiled)})

if __name__ == "__main__":
    ddp_host.main()
