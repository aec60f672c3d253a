"""Longest text that a network can read."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_length(network: nn.Module, length: int, *, limits: str) -> None:
    """Check that a table of positions covers every token of a text; rotary embeddings have no table.

    Args:
        network: its `config.max_position_embeddings` is read.
        length: of the text, tokens.
        limits: the arguments that limit it, for the error.

    Raises:
        ValueError: it has not.
    """
    config: Any = getattr(network, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and length > most and not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"a text of {length} tokens is longer than the {most} positions of {type(network).__name__}: lower {limits}"
        )
