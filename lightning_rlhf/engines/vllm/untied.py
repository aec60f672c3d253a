"""Output layer as weights of its own, for servers that keep a stale copy of a tied one.

vLLM on a CPU packs the output layer at the start and, where it is tied to the embeddings, does not pack it anew when
weights are reloaded (0.32). Such a server gets a folder in which the output layer is not tied.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_rlhf.models.exported import structure

UNTIED = "policy-untied"
"""Name under which such a server serves the policy."""
TIED = "policy"
FILE = "output_layer.safetensors"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def is_tied(network: Any) -> bool:
    """Return True if the output layer has the embeddings' weights."""
    return bool(getattr(network.config.get_text_config(), "tie_word_embeddings", False))


def write_output_layer(network: Any, folder: Path) -> None:
    """Write the embeddings in a folder once more, as the output layer.

    Args:
        network: that the folder holds, which may be without weights.
        folder: with safetensors; an index there gets the new file too.

    Raises:
        ValueError: the folder has no embeddings.
    """
    source, target = (_weight_of(network, part) for part in (network.get_input_embeddings(), _head(network)))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if source in tensors.keys():  # noqa: SIM118  # it is no mapping
                save_file({target: tensors.get_tensor(source)}, folder / FILE, metadata={"format": "pt"})
                break
    else:
        raise ValueError(f"{folder} has no weights {source} in its safetensors")
    index = folder / INDEX
    if index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        values["weight_map"][target] = FILE
        index.unlink()
        index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_untied_copy(folder: Path, target: Path) -> None:
    """Write a copy of a folder that links to its files and has the output layer as weights of its own.

    Args:
        folder: of a model whose output layer is tied.
        target: an empty folder.

    Raises:
        ValueError: the folder has no embeddings in safetensors.
    """
    for file in folder.iterdir():
        (target / file.name).symlink_to(file.resolve())
    write_output_layer(structure(folder), target)
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for part in (values, *(values[name] for name in ("text_config",) if name in values)):
        part["tie_word_embeddings"] = False
    (target / CONFIG).unlink()
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _head(network: Any) -> nn.Module:
    head: nn.Module = network.get_output_embeddings()
    return head


def _weight_of(network: nn.Module, part: nn.Module) -> str:
    """Return the name of the weight of a layer."""
    return next(f"{name}.weight" for name, module in network.named_modules() if module is part)
