"""PEFT adapters of a network: creation, detection and merging."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from lightning_rlhf.folders.inspection import check_adapter, loading
from lightning_rlhf.folders.location import local_folder
from lightning_rlhf.models.quantization import in_full_precision, is_quantized

logger = logging.getLogger(__name__)

MOVED = "weights_moved_by_adapter"
"""Attribute of an adapted network: names of weights that PEFT changed when it added the adapter."""
SAMPLED = 64
"""Number of sampled entries of a weight."""


def with_adapter(network: nn.Module, config: Any | None, *, task: str) -> nn.Module:
    """Wrap the network in a PEFT adapter; returns it unchanged without `config`.

    Args:
        network: a transformers model.
        config: a `peft.PeftConfig`; it is not changed.
        task: PEFT's name of the network's task; it replaces the config's, so that one config serves policy and value.

    Raises:
        ValueError: `peft` is not installed, or `config` is not one of its configurations.
    """
    if config is None:
        return network
    peft = _peft("`peft` was set")
    if not isinstance(config, peft.PeftConfig):
        raise ValueError(f"`peft` must be a peft.PeftConfig such as peft.LoraConfig: got {type(config).__name__}")
    config = copy.deepcopy(config)
    config.task_type = task
    start = [(name, weight, sampled(weight)) for name, weight in network.named_parameters()]
    with torch.device("cpu"):  # whose random numbers are the same wherever the network is; PEFT moves the adapter to it
        adapted = peft.get_peft_model(network, config)
    moved = [name for name, weight, numbers in start if not torch.equal(sampled(weight), numbers)]
    setattr(adapted, MOVED, moved)
    return adapted


@torch.no_grad()
def sampled(weight: Tensor) -> Tensor:
    """Sample up to about 64 numbers spread over a weight, enough to identify it."""
    numbers = weight.detach().reshape(-1)
    return numbers[:: max(1, numbers.numel() // SAMPLED)].clone()


def is_adapted(network: nn.Module) -> bool:
    """Return True if the network has a PEFT adapter that can be switched off."""
    return hasattr(network, "disable_adapter") and hasattr(network, "peft_config")


def is_off(network: nn.Module) -> bool:
    """Return True if the network's adapter is switched off, as inside `PolicyModel.reference`."""
    return is_adapted(network) and any(getattr(x, "disable_adapters", False) is True for x in network.modules())


@contextmanager
def adapter_off(network: Any) -> Iterator[None]:
    """Context that switches the adapter off, so that the network is the one before the adapter.

    Raises:
        ValueError: it would not be, because training or the adapter's start changed a weight under the adapter.
    """
    with network.disable_adapter():
        acting = [name for name, weight in network.named_parameters() if weight.requires_grad]
        acting = [name for name in acting if not name.startswith("prompt_encoder.")]
        if acting:
            raise ValueError(
                f"the reference is the policy with its adapter off, but {len(acting)} of the trained weights act there "
                f"too, such as {acting[0]}: set `bias: none` in `peft`, or `reference` to the model at the start"
            )
        if moved := getattr(network, MOVED, None):
            raise ValueError(
                "the reference is the policy with its adapter off, but the adapter's start changed the weights under "
                f"it, such as {moved[0]}: set `init_lora_weights: true` in `peft`, or `reference` to the model at the "
                "start"
            )
        yield


def bare_base(network: Any) -> nn.Module:
    """Return the model under an adapter, as it was before the adapter.

    Args:
        network: in an adapter, which is switched off in it for good.
    """
    network.base_model.disable_adapter_layers()
    return network.get_base_model()


def merged(network: nn.Module) -> nn.Module:
    """Copy the network with its adapter folded into the weights, those of a quantized one before they were rounded.

    Raises:
        ValueError: it has no adapter, or one that adds tokens or layers.
    """
    if not is_adapted(network):
        raise ValueError("`merge_adapter` was asked for, but the model has no adapter: leave it out")
    if not hasattr(network, "merge_and_unload"):
        raise ValueError("`merge_adapter` was asked for, but the adapter is no change of weights: leave it out")
    return fold(in_full_precision(network) if is_quantized(network) else copy.deepcopy(network))


def fold(network: Any) -> nn.Module:
    """Fold an adapter into the weights of its network and return the network.

    Because the change would reach both otherwise, a weight that an adapted layer shares with another is untied first.

    Args:
        network: in an adapter; it is changed.
    """
    holders = Counter(id(weight) for module in network.modules() for weight in module._parameters.values())
    for layer in network.modules():
        if not hasattr(layer, "base_layer") or hasattr(layer, "token_indices"):  # PEFT ties replaced rows by itself
            continue
        for name, weight in list(layer.base_layer.named_parameters(recurse=False)):
            if holders[id(weight)] > 1:
                own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                setattr(layer.base_layer, name, own)
    return network.merge_and_unload()


def holds_adapter(folder: str | Path) -> bool:
    """Return True if a folder holds an adapter and no full model."""
    return (Path(folder) / "adapter_config.json").is_file()


def base_of(folder: str | Path) -> str:
    """Path of the base model that a folder's adapter belongs to.

    Raises:
        ValueError: a folder is not whole, adapters name each other, or the model is one of a hub that is not in the
            local cache.
    """
    chain = [str(folder), _named_base(folder)]
    while holds_adapter(chain[-1]):
        if Path(chain[-1]).resolve() in (Path(above).resolve() for above in chain[:-1]):
            raise ValueError(
                f"{chain[-2]}/adapter_config.json names {chain[-1]} as the base model, which leads round to itself: "
                "name the model's folder"
            )
        chain.append(_named_base(chain[-1]))
    return chain[1] if local_folder(chain[1]) is not None else _cached(chain[1], named_by=folder)


def _cached(name: str, *, named_by: str | Path) -> str:
    """Find the local cache folder of a hub model that was loaded before.

    Raises:
        ValueError: it was not.
    """
    try:
        return str(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{named_by}/adapter_config.json names {name} of a hub as its base model, which is not in the local cache, "
            f"and a folder never asks the network: run `hf download {name}`, or name there the folder it lies in"
        ) from error


def _named_base(folder: str | Path) -> str:
    return str(check_adapter(Path(folder))["base_model_name_or_path"])


def holds_reward_adapter(folder: str | Path) -> bool:
    """Return True if a folder's adapter was trained on a sequence-classification model and so has a head."""
    return check_adapter(Path(folder)).get("task_type") == "SEQ_CLS"


def merged_adapter(network: nn.Module, folder: str | Path, *, task: str) -> nn.Module:
    """Fold a folder's adapter into the network, so that switching a new adapter off gives that model.

    Args:
        network: the base model.
        folder: of the adapter; one of a language model also fits a scorer's backbone.
        task: PEFT's name of the network's task.

    Raises:
        ValueError: the adapter can't be loaded, or does not fit the model.
    """
    peft = _peft(f"{folder} holds an adapter")
    with loading("an adapter", str(folder)):
        return _folded(peft, network, folder, task=task)


def _folded(peft: Any, network: nn.Module, folder: str | Path, *, task: str) -> nn.Module:
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type = task if config.task_type == task else None
    logger.info("folding the adapter in %s into its base model: all weights are trained unless `peft` is set", folder)
    return fold(peft.PeftModel.from_pretrained(network, folder, config=config)).requires_grad_()


def _peft(reason: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{reason}, but the package is missing: pip install peft") from error
    return peft
