"""Checks of a model folder before it is loaded: no pickle, no code and no missing file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MERGED = (
    "ADALORA",
    "BOFT",
    "C3A",
    "DELORA",
    "FOURIERFT",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "LORA",
    "MISS",
    "OFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "VBLORA",
    "VERA",
)
"""Types of PEFT adapters that are folded into weights, and whose configs name no other model to load."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "spiece.*", "*.tiktoken", "tekken.json")
"""Names under which weights that are no safetensors, and tokenizers, are saved."""


def check_weights(folder: Path) -> None:
    """Check that a folder holds a config with all its safetensors and names no code of a hub.

    Raises:
        ValueError: it does not.
    """
    config = read_object(folder / "config.json", needed="a folder written by `save_pretrained`")
    for key, value in config.items():
        if key.endswith("attn_implementation") and "/" in str(value):
            raise ValueError(
                f"{folder}/config.json: `{key}` names code of a hub, {value!r}, which is not run: remove it"
            )
    _check_safetensors(folder, index="model.safetensors.index.json")


def check_adapter(folder: Path) -> dict[str, Any]:
    """Check that an adapter's folder holds safetensors and names no Python module to import.

    Returns:
        its `adapter_config.json`.

    Raises:
        ValueError: it does not, it names one, is of a type that loads more than its folder, or does not say which model
            it belongs to.
    """
    file = folder / "adapter_config.json"
    config = read_object(file, needed="a folder written by PEFT's `save_pretrained`")
    if config.get("megatron_config"):
        raise ValueError(f"{file}: `megatron_config` makes PEFT import the module that the file names: remove it")
    if config.get("peft_type") not in MERGED:
        raise ValueError(
            f"{file}: `peft_type` is {config.get('peft_type')!r}, which may load more than this folder, or can't be "
            f"folded into a model: give one of {', '.join(MERGED)}"
        )
    if not isinstance(config.get("base_model_name_or_path"), str):
        raise ValueError(f"{file} does not say which model it belongs to: set `base_model_name_or_path`")
    _check_safetensors(folder, index="adapter_model.safetensors.index.json")
    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would look for them on a hub
        raise ValueError(f"{folder} has no {ADAPTER_WEIGHTS}, only {_content(folder)}: copy it again")
    return config


def check_tokenizer(folder: Path) -> None:
    """Check that a folder holds a tokenizer.

    Raises:
        ValueError: it holds none, or its config is no JSON object.
    """
    if not holds_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokenizer, only {_content(folder)}: save the model's tokenizer there with "
            "`tokenizer.save_pretrained`"
        )
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):  # the first names the tokenizer's class
        if (folder / name).exists():
            read_object(folder / name, needed="the tokenizer that was saved with the model")


def holds_tokenizer(folder: Path) -> bool:
    """Return True if the folder holds any file of a tokenizer."""
    return any(True for pattern in TOKENIZERS for _ in folder.glob(pattern))


def read_object(file: Path, *, needed: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        file: to read.
        needed: what the user should give instead.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}, only {_content(file.parent)}: give {needed}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): give {needed}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object: give {needed}")
    return content


@contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Context that turns any loading error of a folder into one sentence with its path.

    Raises:
        ValueError: something was raised inside, running out of memory apart.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"`path`: can't load {what} from {path}: {_reason(error)}") from error


def _check_safetensors(folder: Path, *, index: str) -> None:
    names = {file.name for file in folder.glob("*.safetensors")}
    if not names:
        pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
        if pickled:
            raise ValueError(
                f"{folder} holds its weights in {pickled[0]}, and a pickle can run code when it is loaded: save them "
                "as safetensors with `save_pretrained`"
            )
        raise ValueError(f"{folder} holds no weights (*.safetensors), only {_content(folder)}: copy it again")
    if not (folder / index).exists():
        return
    shards = read_object(folder / index, needed="the folder as it was saved").get("weight_map")
    missing = sorted(set(map(str, shards.values())) - names) if isinstance(shards, dict) else ["a `weight_map`"]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, of which {index} speaks: copy the folder again")


def _content(folder: Path) -> list[str]:
    """List up to five file names of a folder."""
    names = sorted(file.name for file in folder.iterdir())
    return names[:5] + (["..."] if len(names) > 5 else [])


def _reason(error: Exception) -> str:
    """First lines of an error, or its class name if it has no readable text."""
    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else text[:237] + "..."
    return short if " " in text else f"{type(error).__name__} {short}".strip()
