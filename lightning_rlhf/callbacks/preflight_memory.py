"""Estimate of the memory that a run takes."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_rlhf.callbacks.ema import EMA
from lightning_rlhf.callbacks.gradient_norms import GradientNorms
from lightning_rlhf.models.quantization import is_quantized

MOMENTS = 2
"""Tensors that Adam keeps of each trained parameter, as large as it."""
MEASUREMENT = 2
"""Gradients of the policy that `GradientNorms` holds beside the one of the step."""
LAYER = 34
"""Bytes a layer keeps per token and hidden unit, at two bytes a number and without attention's scores, which today's
kernels do not keep (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
equation 1)."""
LAYER_INPUT = 2
"""The same, where a layer is computed again in the backward pass: its input alone, which autocast leaves as it is."""
AUTOCAST = 1.4
"""How much more LAYER is under autocast, which leaves norms and residuals in float32 (measured on a Llama)."""
UPDATE = ("gradients", "autocast copies", "activations", "GradientNorms")
"""Parts that exist only while the networks learn; the copy that samples exists only at another time."""
REMEDIES = {
    "activations": "lower `updates.microbatch_tokens`, or set `policy.gradient_checkpointing`",
    "frozen networks": "set `reference_dtype: bfloat16`",
    "EMA": "take the EMA out",
    "GradientNorms": "take GradientNorms out",
}
SMALLER = "take a smaller model, or train an adapter (`policy.peft`)"


def memory_estimate(trainer: Trainer, module: Any) -> dict[str, float]:
    """Memory of this process in GiB by part; activations are those of the largest forward and backward.

    Left out are the process itself, what attention caches while it samples, and activations where the data or the
    network do not say how large they are.
    """
    trained = _bytes(module, trained_only=True)
    sizes = {"weights": _bytes(module), "gradients": trained, "optimizer": MOMENTS * trained}
    policy: Any = getattr(module, "policy", None)
    if getattr(module, "responder", None) is not None:
        collector = module.responder.collector
        frozen = collector.frozen()
        sizes["frozen networks"] = sum(_bytes(network) for network in frozen)
        with trainer.precision_plugin.forward_context():
            computed = policy.computing_dtype(module.device.type)
            dtype = collector.engine.copy_dtype(policy, collector.generation, module.device.type)
        weight = next(policy.parameters()).element_size()
        if (
            dtype is not None and not is_quantized(policy) and (dtype.itemsize != weight or module.device.type == "cpu")
        ):  # which packs them
            sizes["sampling copy"] = _bytes(policy) * dtype.itemsize // weight
        if computed.itemsize != weight:
            sizes["autocast copies"] = trained * computed.itemsize // weight
        sizes["activations"] = _activations(trainer, module, computed)
        sizes |= _of_callbacks(trainer, module)
    return {name: size / 2**30 for name, size in sizes.items()}


def memory_peak(parts: dict[str, float]) -> float:
    """Peak memory in GiB: the permanent parts plus the larger of sampling and update."""
    sampling, update = parts.get("sampling copy", 0.0), sum(parts.get(name, 0.0) for name in UPDATE)
    return sum(parts.values()) - min(sampling, update)


def memory_report(parts: dict[str, float]) -> str:
    """Describe the estimate in a sentence."""
    listed = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
    rest = "" if parts.get("activations") else ", and activations"
    return (
        f"preflight: about {memory_peak(parts):.2f} GiB a process ({listed}){rest}; "
        f"most of it is {max(parts, key=parts.__getitem__)}"
    )


def memory_warning(parts: dict[str, float], available: float | None) -> str | None:
    """Name a remedy if the estimate exceeds the available GiB per process; returns None if it does not."""
    needed = memory_peak(parts)
    if available is None or needed <= available:
        return None
    largest = max(parts, key=parts.__getitem__)
    return (
        f"preflight: this run needs about {needed:.2f} GiB a process, and there are {available:.2f}; most of it is "
        f"{largest} ({parts[largest]:.2f}): {REMEDIES.get(largest, SMALLER)}"
    )


def memory_available(trainer: Trainer, device: torch.device) -> float | None:
    """Memory in GiB of the GPU, or a process's share of the machine's; returns None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory / 2**30)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / trainer.num_devices


def _activations(trainer: Trainer, module: Any, dtype: torch.dtype) -> int:
    """Bytes kept by the largest forward, of texts in the policy or of responses in all trained networks."""
    data, updates = getattr(trainer, "datamodule", None), module.updates
    prompt, text = (getattr(data, name, None) for name in ("max_prompt_tokens", "text_tokens"))
    networks = [network for network in (module.policy.network, getattr(module.value, "network", None)) if network]
    responses = updates.minibatch or getattr(data, "batch_size", 1) * module.generation.samples_per_prompt
    texts = round(responses * getattr(data, "pretrain_ratio", 0.0)) if module.algorithm.ptx_coef else 0
    sizes = [0]
    if prompt is not None:
        tokens = _tokens(updates, rows=responses, width=prompt + module.collector.sampler.longest)
        sizes.append(sum(_kept(network, tokens, dtype) for network in networks))
    if text is not None and texts:
        sizes.append(_kept(networks[0], _tokens(updates, rows=texts, width=text), dtype))
    return max(sizes)


def _tokens(updates: Any, *, rows: int, width: int) -> int:
    """Tokens of the largest microbatch; a longer sequence is one by itself."""
    if updates.microbatch_tokens is not None:
        return min(max(updates.microbatch_tokens, width), rows * width)
    return min(updates.microbatch or rows, rows) * width


def _kept(network: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a network's activations; 0 if its config has other names for its sizes."""
    config: Any = getattr(network, "config", None)
    layers, hidden = (getattr(config, name, None) or 0 for name in ("num_hidden_layers", "hidden_size"))
    name = "is_activation_checkpointing"  # transformers renamed it
    again = getattr(network, name if hasattr(network, name) else "is_gradient_checkpointing", False)
    stored = next(network.parameters()).dtype
    layer = LAYER * dtype.itemsize / 2 * (1.0 if dtype == stored else AUTOCAST)
    kept = LAYER_INPUT * stored.itemsize / 2 * layers + layer if again else layer * layers
    return int(tokens * hidden * kept)


def _of_callbacks(trainer: Trainer, module: Any) -> dict[str, int]:
    """Bytes of callbacks' copies of weights and gradients."""
    trained = [p for p in module.policy.parameters() if p.requires_grad]
    sizes = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMA):
            sizes["EMA"] = sum(p.numel() * max(p.element_size(), 4) for p in trained)
        elif isinstance(callback, GradientNorms) and module.algorithm.ptx_coef:
            copies = MEASUREMENT if trainer.world_size > 1 else 1  # one process copies none of the step's gradients
            sizes["GradientNorms"] = copies * sum(p.numel() * p.element_size() for p in trained)
    return sizes


def _bytes(network: nn.Module, *, trained_only: bool = False) -> int:
    """Bytes of the distinct parameters, a sharded one counted whole."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad or not trained_only)
