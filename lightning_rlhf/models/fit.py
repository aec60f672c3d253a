"""Agreement of the weights in a folder with the network of its config."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

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
