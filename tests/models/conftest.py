"""Networks in adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_rlhf.models import ModelSource


@pytest.fixture
def lora() -> Callable[..., Any]:
    """A LoRA configuration that changes the network from the start."""
    peft = pytest.importorskip("peft")

    def make(target: str = "c_attn", **options: Any) -> Any:
        usual = {"r": 2, "lora_alpha": 16, "init_lora_weights": False, "target_modules": [target]}
        return peft.LoraConfig(**(usual | options))

    return make


@pytest.fixture
def adapted(make_folder, lora) -> Callable[..., Any]:
    """A language model in a LoRA adapter."""

    def make(**options: Any) -> Any:
        torch.manual_seed(2)
        return ModelSource(path=make_folder(), peft=lora(**options)).causal_lm()

    return make
