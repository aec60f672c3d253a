"""Weights in files: those that a process reads only its shard of, and agreement with the config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils.hub import cached_file

_BUFFERS = re.compile(r"(^|\.)((attn|attention|self_attn)\.(bias|masked_bias)|rotary\w*\.inv_freq|position_ids)$")
"""Names under which older versions of transformers saved buffers that a network computes itself."""


def check_shapes(path: str, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Check that every weight has the shape that the config asks for.

    Args:
        path: of the folder, for the error.
        mismatched: name, shape in the folder and shape in the network of each that has another.

    Raises:
        ValueError: one has not.
    """
    for name, shape, needed in sorted(mismatched):
        if name == "score.weight":
            raise ValueError(f"`path`: {path}: the reward head `score` has {shape[0]} outputs; one scalar is needed")
        raise ValueError(
            f"`path`: can't load a model from {path}: {name} has the shape {list(shape)} in its weights and "
            f"{list(needed)} by its config: copy the folder again"
        )


def check_unexpected(network: nn.Module, path: str, unexpected: Iterable[str]) -> None:
    """Check that a folder holds no weight that the network lacks.

    Weights of parts that the network lacks altogether are allowed: the head of another task, an image encoder.

    Args:
        network: a transformers model.
        path: of the folder, for the error.
        unexpected: names of weights that the network did not take.

    Raises:
        ValueError: it does.
    """
    ignored = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    lost = [
        name
        for name in sorted(unexpected)
        if not _BUFFERS.search(name)
        and not any(re.search(pattern, name) for pattern in ignored)
        and _belongs(network, name)
    ]
    if lost:
        raise ValueError(
            f"`path`: {path} holds weights that its config does not ask for, such as {lost[0]} ({len(lost)} in all); "
            "without them the model is another: correct the config, or save the model again that is meant"
        )


def _belongs(network: Any, name: str) -> bool:
    """Return True if a weight lies inside a submodule of the network, below its transformer as a whole."""
    prefix = network.base_model_prefix
    places = {place for place, _ in network.named_modules()} - {"", prefix}
    for full in (name, f"{prefix}.{name}"):
        parts = full.split(".")
        if any(".".join(parts[:count]) in places for count in range(1, len(parts))):
            return True
    return False


CASTS = ("F64", "F32", "F16", "BF16")
"""Dtypes in a file that need only a cast; others are packed or quantized."""


def weight_files(path: str, *, local_files_only: bool) -> list[str]:
    """List the safetensors files of a folder or hub name; those of a hub are downloaded if needed."""

    def find(name: str) -> str | None:
        options: Any = {"local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False}
        return cached_file(path, name, **options)

    if (single := find("model.safetensors")) is not None:
        return [single]
    if (index := find("model.safetensors.index.json")) is None:
        return []
    named = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return [file for name in sorted(set(named)) if (file := find(name)) is not None]


@dataclass(frozen=True, kw_only=True)
class UnreadWeights:
    """File locations of the weights of a network on the meta device."""

    places: dict[str, tuple[str, str]]
    """Location by name of the parameter: the file and the name in it."""
    doubt: str | None = None
    """Reason why they cannot be read one by one; None if they can."""
    others: tuple[str, ...] = ()
    """Names in the files that the network lacks."""

    @classmethod
    def of(cls, network: nn.Module, files: Iterable[str]) -> UnreadWeights:
        """Locate a network's weights in files.

        Tied weights are one, under whichever of their names they lie. A weight that lies nowhere is left out.
        """
        expected, prefix = dict(_named(network)), getattr(network, "base_model_prefix", "")
        places: dict[str, tuple[str, str]] = {}
        doubt, others = None, []
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                    name = key if key in expected else f"{prefix}.{key}"
                    if name not in expected:
                        others.append(key)
                    else:
                        places[name] = (file, key)
                        doubt = doubt or _misfit(name, expected[name], tensors.get_slice(key))
        if len({id(expected[name]) for name in places}) < len(places):
            doubt = "its files hold weights under two names that the network ties"
        return cls(places=places, doubt=doubt, others=tuple(others))

    def missing(self, network: nn.Module) -> list[str]:
        """Names of parameters in no file; for tied ones the first name."""
        weights = dict(_named(network))
        located = {id(weights[name]) for name in self.places}
        return [name for name, weight in network.named_parameters() if id(weight) not in located]

    def fill(self, network: nn.Module) -> None:
        """Read every weight that is still on the meta device; for a sharded one, only this process's rows."""
        names: dict[int, list[str]] = {}
        for name, weight in _named(network):
            names.setdefault(id(weight), []).append(name)
        state: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files = {
                file: stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted({file for file, _ in self.places.values()})
            }
            for weight in network.parameters():
                if weight.is_meta:
                    tied = names[id(weight)]
                    file, key = next(self.places[name] for name in tied if name in self.places)
                    read = nn.Parameter(_read(weight, files[file].get_slice(key)), requires_grad=weight.requires_grad)
                    state |= dict.fromkeys(tied, read)
        network.load_state_dict(state, strict=False, assign=True)


def _misfit(name: str, weight: Tensor, part: Any) -> str | None:
    """Return why a tensor in a file does not fit the weight."""
    if part.get_shape() != list(weight.shape):
        return f"{name} has the shape {part.get_shape()} there, and not {list(weight.shape)}"
    return None if part.get_dtype() in CASTS else f"{name} is not made of floating-point numbers there"


def _named(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """List every name of every parameter."""
    return network.named_parameters(remove_duplicate=False)


def _read(weight: Tensor, part: Any) -> Tensor:
    """Read a tensor or this process's shard of it, in the dtype of `weight`."""
    if not isinstance(weight, DTensor):
        return part[:].to(weight.dtype)
    mesh, local = weight.device_mesh, weight.to_local()
    rows = -(-weight.shape[0] // mesh.size())  # a process's share, as `torch.chunk` has it: the last ones get the rest
    start = mesh.get_local_rank() * rows
    shard = torch.empty(local.shape, dtype=local.dtype, device=mesh.device_type)
    if shard.numel():
        shard.copy_(part[start : start + rows])
    options: Any = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(shard, mesh, weight.placements, **options)
