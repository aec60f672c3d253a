"""PPO inside somebody else's project: a plain LightningCLI, their network, their reward, their callback and logger.

python examples/existing_project/project.py fit --config examples/existing_project/project.yaml
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_rlhf import PPOModule, PromptDataModule


def network(folder: str, frozen_layers: int = 0) -> PreTrainedModel:
    """Their policy, built in Python: whatever they do to it here stands."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers[:frozen_layers]:
        layer.requires_grad_(False)
    return model


def variety(prompts: list[str], responses: list[str]) -> list[float]:
    """Their reward: the share of words that are new."""
    words = [response.split() for response in responses]
    return [len(set(row)) / max(len(row), 1) for row in words]


class Milestones(Callback):
    """Their callback reads the metrics as of any LightningModule."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        print(f"rollout {pl_module.iteration}: score {trainer.callback_metrics['objective/scores']:.3f}")


if __name__ == "__main__":
    cli = LightningCLI(PPOModule, PromptDataModule)
