"""Arguments of `PPOModule` with those of its algorithm beside them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lightning_rlhf import UpdateSchedule
from lightning_rlhf.core import Algorithm

PARTS = [field.name for field in fields(Algorithm)]


def gathered(**options: Any) -> dict[str, Any]:
    """The same with the algorithm's parts in `algorithm`, and `old_logprobs` in `updates`."""
    parts = {name: options[name] for name in PARTS if name in options}
    others = {name: value for name, value in options.items() if name not in PARTS}
    if parts:
        others["algorithm"] = replace(others.get("algorithm", Algorithm()), **parts)
    if "old_logprobs" in others:
        chosen = others.pop("old_logprobs")
        others["updates"] = replace(others.get("updates", UpdateSchedule()), old_logprobs=chosen)
    return others
