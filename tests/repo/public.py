"""Public classes of the library: those that its subpackages export, and the types that flow between them."""

from __future__ import annotations

import inspect
from importlib import import_module

from lightning_rlhf import types

ROOMS = (
    "callbacks",
    "core",
    "data",
    "engines",
    "environments",
    "evaluation",
    "models",
    "modules",
    "rewards",
    "rollout",
)


def classes_of(room: str) -> dict[str, type]:
    """Classes that a subpackage exports, by name."""
    module = import_module(f"lightning_rlhf.{room}")
    values = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in values.items() if inspect.isclass(value)}


INNER = {"Adaptive", "BatchSchedule", "Collector", "EngineError", "Request", "ResumableLoader", "Sampled"}
"""Classes that the modules build by themselves, and the base of bases."""
FLOWING = {name: value for name, value in vars(types).items() if getattr(value, "__module__", "") == types.__name__}
PUBLIC = {name: kind for room in ROOMS for name, kind in classes_of(room).items()}
PUBLIC |= {name: kind for name, kind in FLOWING.items() if inspect.isclass(kind) and not name.startswith("_")}
PUBLIC = {name: kind for name, kind in PUBLIC.items() if name not in INNER}
