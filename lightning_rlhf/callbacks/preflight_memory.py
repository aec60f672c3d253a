"""What the networks of a run take, before it finds out."""

from __future__ import annotations

from lightning.pytorch import LightningModule
from torch import nn

MOMENTS = 2
"""Tensors that Adam keeps of each trained parameter, as large as it."""


def memory_estimate(module: LightningModule) -> dict[str, float]:
    """GiB of this process's networks, gradients and Adam's moments; activations and caches come on top."""
    weights = _bytes(module, trained_only=False)
    trained = _bytes(module, trained_only=True)
    collector = getattr(module, "collector", None)
    frozen = [] if collector is None else [*collector.reward.networks(), collector.reference]
    found = {"weights": weights, "gradients": trained, "optimizer": MOMENTS * trained}
    found["frozen networks"] = sum(_bytes(network, trained_only=False) for network in frozen if network is not None)
    return {name: size / 2**30 for name, size in found.items()}


def memory_report(module: LightningModule) -> str:
    """The estimate in a sentence."""
    parts = memory_estimate(module)
    listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    return f"preflight: at least {sum(parts.values()):.2f} GiB a process ({listed}), and activations"


def _bytes(network: nn.Module, *, trained_only: bool) -> int:
    """Of distinct parameters; of a sharded one, the whole."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad or not trained_only)
