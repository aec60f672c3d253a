"""Networks whose frozen weights are quantized under an adapter (QLoRA, Dettmers et al. 2023)."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

Quantization = Literal["nf4", "int8"]
IN_FULL = "build_in_full_precision"
"""Attribute of a quantized network: builds the network that it was quantized from."""


def quantized_by(kind: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantize the linear maps as it loads them, but not the head.

    `nf4` is 4 bits a weight, in blocks of 64 whose scales are quantized too, and computes in `dtype`. `int8` is 8
    bits, with a scale for each row.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    _import_bitsandbytes()
    heads = ["lm_head", "score"]
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=heads)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=heads,
        )
    return {"quantization_config": config}


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without the package `kernels`, by which it would fetch code from a hub on some CPUs.

    Raises:
        ValueError: it is not installed.
    """
    if sys.modules.get("bitsandbytes") is not None:
        return
    before, logger = sys.modules.get("kernels"), logging.getLogger("bitsandbytes")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's way to refuse an import
    logger.disabled = True
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "`quantization` needs bitsandbytes, which is missing: pip install 'lightning-rlhf[quantization]'"
        ) from error
    finally:
        logger.disabled = False
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


if all(find_spec(name) for name in ("bitsandbytes", "kernels")):
    _import_bitsandbytes()  # before PEFT imports it, which would let it fetch


def is_quantized(network: nn.Module) -> bool:
    """Return True if a linear map of the network is quantized."""
    return any(type(module).__module__.startswith("bitsandbytes.") for module in network.modules())


def settle(network: Any, build: Callable[[], nn.Module]) -> None:
    """Let a quantized network compute alike in train and eval mode, and note how to build it in full precision.

    In eval mode bitsandbytes would change the layout of 4-bit weights in place on some CPUs, after which they have no
    gradient to pass on, and round the inputs of 8-bit ones, which it does not in train mode.

    Args:
        network: as loaded.
        build: of the network that it was made from.

    Raises:
        ValueError: no linear map of it was quantized.
    """
    if not is_quantized(network):
        raise ValueError(f"`quantization`: {type(network).__name__} has no linear map to quantize: leave it out")
    setattr(network, IN_FULL, build)
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_as_in_training)
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config


def _as_in_training(layer: Any, _: Any) -> None:
    """Put a layer of 8 bits into train mode, with its codes and scales on the device of its weight."""
    layer.training = True
    codes, state = layer.weight, layer.state
    scales = codes.SCB if state.SCB is None else state.SCB
    codes.CB = codes.SCB = None  # or the layer would take these for the state's
    state.CB, state.SCB = codes.data, scales.to(codes.device)


def in_full_precision(network: nn.Module) -> nn.Module:
    """Put a quantized network's adapter on the weights that were quantized, in their own precision.

    Raises:
        ValueError: the network was not loaded by a `ModelSource`, so that these are not known.
    """
    import peft

    adapted: Any = network
    build = getattr(adapted.get_base_model(), IN_FULL, None)
    if build is None:
        raise ValueError(
            "a quantized model's adapter is folded into the weights that were quantized, and it is not known where "
            "they are: build it by ModelSource(quantization=...), or save the adapter alone"
        )
    with torch.random.fork_rng(devices=[]):  # an adapter's start is drawn, and training must not notice
        whole = peft.get_peft_model(build(), adapted.peft_config[adapted.active_adapter])
    trained = {name: tensor.cpu() for name, tensor in peft.get_peft_model_state_dict(adapted).items()}
    peft.set_peft_model_state_dict(whole, trained)
    return whole


def shared(network: nn.Module) -> nn.Module:
    """Copy a network's modules but none of its tensors, so that the copy has modes of its own and the same weights."""
    copies: dict[int, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            clone = copies[id(module)] = copy.copy(module)
            children = {name: child if child is None else of(child) for name, child in module._modules.items()}
            clone.__dict__["_modules"] = children
        return copies[id(module)]

    return of(network)


def keep_adapter_only(module: nn.Module) -> None:
    """Leave the quantized weights under an adapter out of a module's state, to which loading then adds today's.

    Args:
        module: holds the network as `network`.
    """
    module.register_state_dict_post_hook(_without_base)
    module.register_load_state_dict_pre_hook(_with_base)


def _without_base(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    kept = {f"{prefix}{name}" for name, weight in module.named_parameters() if weight.requires_grad}
    kept |= {f"{prefix}{name}" for name, _ in module.named_buffers()}
    for name in [name for name in state if name.startswith(f"{prefix}network.") and name not in kept]:
        del state[name]


def _with_base(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, weight in module.named_parameters(remove_duplicate=False):
        if not weight.requires_grad:
            state[f"{prefix}{name}"] = weight.data
