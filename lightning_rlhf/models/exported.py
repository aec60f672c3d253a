"""Folders of whole policies that another program reads, such as an inference server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_rlhf.folders.inspection import check_weights, holds_tokenizer, loading
from lightning_rlhf.folders.location import local_folder
from lightning_rlhf.models.adapter import holds_adapter


def exported_folder(policy: str) -> Path | None:
    """Return the folder of a policy; None for a hub name.

    Raises:
        ValueError: there is no such folder, or it holds no whole model.
    """
    folder = local_folder(policy)
    if folder is None:
        return None
    if holds_adapter(folder):
        raise ValueError(
            f"{folder} holds an adapter, and a server takes whole weights: export the policy with `merge_adapter` "
            "(`--export.merge_adapter=true`), and give that folder"
        )
    check_weights(folder)
    return folder.resolve()


def cached_folder(name: str) -> Path:
    """Return the folder of a hub name in the local cache.

    Raises:
        ValueError: it is not there.
    """
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not in the local cache: run `hf download {name}`") from error


def lacks_tokenizer(folder: Path) -> bool:
    """Return True if a folder holds weights alone."""
    return not holds_tokenizer(folder)


def structure(folder: Path) -> Any:
    """Build a folder's language model without its weights, on the meta device.

    Raises:
        ValueError: its config is of no language model.
    """
    with loading("a model", str(folder)), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
