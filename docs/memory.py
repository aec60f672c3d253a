"""Writes the tables of docs/memory.md: `python docs/memory.py` prints them, from the estimate that `Preflight` makes.

The networks are built on the meta device, of Qwen2.5's shapes: nothing is downloaded and no weight exists.
"""

from __future__ import annotations

from functools import cache

import torch
from lightning.pytorch import LightningDataModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen2Config

from lightning_rlhf import PPOModule, SamplingParams, UpdateSchedule
from lightning_rlhf.callbacks.preflight_memory import memory_estimate, memory_peak
from lightning_rlhf.models import ScalarModel
from lightning_rlhf.rewards import ModuleReward

SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
    "14B": (5120, 13_824, 48, 40, 8, 152_064, False),
}
"""Hidden units, those of the MLP, layers, heads, key-value heads, vocabulary, head tied to the embedding."""
PROMPT = RESPONSE = 512
SLOTS, MICROBATCH = 64, 4096
CARDS = (24, 48, 80)
ROOM = 0.9
"""Share of a card that a run may plan with; the rest is for the process and for fragments."""
NF4 = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight: 4, and its share of an 8-bit scale for 64 of them, and of a scale of 256 such scales."""
RUNS = {
    "full": {},
    "full, reward model": {"learned": True},
    "full, reward model, value network": {"learned": True, "value": True},
    "LoRA": {"lora": True},
    "LoRA, reward model": {"lora": True, "learned": True},
    "QLoRA": {"lora": True, "bits": NF4},
}


class Sizes(LightningDataModule):
    """Sizes of the data that the estimate reads."""

    batch_size, max_prompt_tokens = 64, PROMPT


def config_of(size: str) -> Qwen2Config:
    """Return the shape of a network."""
    hidden, inner, layers, heads, pairs, vocabulary, tied = SHAPES[size]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        num_labels=1,
        pad_token_id=0,
    )


def policy_of(config: Qwen2Config, *, lora: bool) -> nn.Module:
    """Build a policy that recomputes activations: in float32, or in bfloat16 with an adapter of rank 16."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
        network.gradient_checkpointing_enable()
        return get_peft_model(network, LoraConfig(r=16, target_modules="all-linear")) if lora else network


def rounded(network: nn.Module, bits: float) -> nn.Module:
    """Replace the weights under an adapter by as many bytes as they take when each has `bits`."""
    for layer in [module for module in network.modules() if hasattr(module, "lora_A")]:
        size = int(layer.base_layer.weight.numel() * bits / 8)
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        layer.base_layer.weight = nn.Parameter(packed, requires_grad=False)
    return network


def scorer_of(config: Qwen2Config, dtype: torch.dtype) -> nn.Module:
    """Build a network with one scalar per token, of the policy's size."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


def value_of(config: Qwen2Config) -> nn.Module:
    """Build a value network in float32 that recomputes activations."""
    network = scorer_of(config, torch.float32)
    network.gradient_checkpointing_enable()
    return network


def length(prompts: list[str], responses: list[str]) -> list[float]:
    """Score by a function, which takes no memory."""
    return [float(len(response)) for response in responses]


@cache
def parts_of(
    size: str, *, lora: bool = False, learned: bool = False, value: bool = False, bits: float | None = None
) -> dict[str, float]:
    """GiB of each part, as `Preflight` estimates them, and of attention's cache, which it leaves out."""
    config = config_of(size)
    policy = policy_of(config, lora=lora)
    module = PPOModule(
        policy if bits is None else rounded(policy, bits),
        ModuleReward(scorer_of(config, torch.bfloat16)) if learned else length,
        generation=SamplingParams(max_new_tokens=RESPONSE, slots=SLOTS),
        updates=UpdateSchedule(microbatch_tokens=MICROBATCH),
        reference_dtype=None if lora else "bfloat16",
    )
    module.configure_model()
    module.value = ScalarModel(value_of(config)) if value else None
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    trainer.datamodule = Sizes()
    parts = memory_estimate(trainer, module) | ({} if bits is None else {"sampling copy": 0.0})
    pairs = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * pairs * torch.bfloat16.itemsize * SLOTS * (PROMPT + RESPONSE)
    return parts | {"attention's cache": kept / 2**30}


def peak_of(parts: dict[str, float]) -> float:
    """GiB at the worst moment; the cache lives as long as the copy that samples."""
    sampling = parts["sampling copy"] + parts["attention's cache"]
    held = {name: size for name, size in parts.items() if name != "attention's cache"}
    return memory_peak(held | {"sampling copy": sampling})


def card_of(needed: float) -> str:
    """Return the smallest card that it fits on."""
    return next((f"{card} GB" for card in CARDS if needed <= ROOM * card), "several")


def fits() -> str:
    """Return the table of what fits where."""
    lines = ["| model | " + " | ".join(RUNS) + " |", "|---|" + "---|" * len(RUNS)]
    for size in SHAPES:
        needed = [peak_of(parts_of(size, **options)) for options in RUNS.values()]
        lines.append(f"| {size} | " + " | ".join(f"{card_of(one)} ({one:.0f})" for one in needed) + " |")
    return "\n".join(lines)


def pieces(size: str = "1.5B") -> str:
    """Return the table of what one model's memory is made of."""
    columns = {name: parts_of(size, **options) for name, options in RUNS.items()}
    names = list(dict.fromkeys(name for parts in columns.values() for name in parts))
    lines = [f"| GiB, {size} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(f"{parts.get(name, 0.0):.1f}" for parts in columns.values()) + " |")
    peaks = " | ".join(f"{peak_of(parts):.1f}" for parts in columns.values())
    return "\n".join([*lines, f"| at the worst moment | {peaks} |"])


if __name__ == "__main__":
    print(fits(), pieces(), sep="\n\n")
