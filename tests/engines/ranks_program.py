"""A run of some processes with an engine: `python ranks_program.py FOLDER DEVICES STRATEGY ENGINE [URL]`.

FOLDER holds `model` and `prompts.jsonl` and takes `out-ENGINE-DEVICES.pt`.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_rlhf import PPOModule, PromptDataModule
from lightning_rlhf.engines import LocalEngine, SamplingParams, VLLMServer
from lightning_rlhf.models import ModelSource
from lightning_rlhf.rewards import Reward


class Letters(Reward):
    """A number of the response's tokens alone."""

    def __call__(self, rollout, rows):
        weight = torch.linspace(-1, 1, 64, dtype=rollout.logprobs.dtype)
        return (weight[rollout.tokens[:, rollout.prompt_width :]] * rollout.response_mask).sum(1)


class Overlapping(LocalEngine):
    """Plays a server in the process, which draws from a copy of the weights that were loaded."""

    is_external = True
    overlaps = True

    def load(self, policy, version):
        super().load(copy.deepcopy(policy).eval(), version)


class Save(Callback):
    """A checkpoint after the third rollout, with what is ahead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        if module.iteration == 3:
            trainer.save_checkpoint(self.path)


def main() -> None:
    folder, devices, strategy, kind, *rest = sys.argv[1:]
    home, count = Path(folder), int(devices)
    engine = Overlapping() if kind in ("ahead", "resumed") else VLLMServer(urls=rest, patience=1.0)
    torch.manual_seed(0)
    source = ModelSource(path=str(home / "model"))
    module = PPOModule(
        source,
        Letters(),
        engine=engine,
        generation=SamplingParams(max_new_tokens=6, samples_per_prompt=2, seed=3),
        lr=0.02,
    )
    data = PromptDataModule(train=str(home / "prompts.jsonl"), batch_size=4 // count, seed=1)
    keep = Save(home / f"{kind}-{count}.ckpt")
    kinds = {"ddp": DDPStrategy(process_group_backend="gloo"), "fsdp2": ModelParallelStrategy(count, 1), "auto": "auto"}
    trainer = Trainer(
        accelerator="cpu",
        devices=count,
        strategy=kinds[strategy],
        precision="32-true",
        max_epochs=2,
        logger=False,
        callbacks=[keep],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    start = home / "ahead-2.ckpt" if kind == "resumed" else None
    trainer.fit(module, data, ckpt_path=start)
    parts = [weight.detach() for weight in module.policy.parameters()]
    weights = torch.cat([getattr(part, "full_tensor", lambda p=part: p)().flatten() for part in parts])
    everywhere = module.all_gather(weights) if count > 1 else weights[None]
    if trainer.global_rank == 0:
        torch.save({"weights": everywhere, "steps": keep.steps}, home / f"out-{kind}-{count}.pt")


if __name__ == "__main__":
    main()
