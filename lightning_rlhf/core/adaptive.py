"""Immutable values that adapt by returning a successor."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Frozen setting with numbers that move during training, its own or those of a setting inside it.

    State is Python floats and not buffers, because precision plugins cast float buffers (bf16: 1.0 · 1.001 = 1.0).
    """

    def moving(self) -> tuple[str, ...]:
        """Names of the object's own fields that move; none by default."""
        return ()

    def state(self) -> dict[str, float]:
        """Return the moving numbers by name for a checkpoint, those of an inner setting as `field.name`."""
        own = {name: getattr(self, name) for name in self.moving()}
        return own | {f"{outer}.{name}": x for outer, inner in self._inner() for name, x in inner.state().items()}

    def restored(self, state: dict[str, float]) -> Self:
        """Return the same setting with the moving numbers of a checkpoint.

        Raises:
            ValueError: `state` names other numbers than this object moves.
        """
        if state.keys() != self.state().keys():
            raise ValueError(
                f"the checkpoint holds {sorted(state)} for {type(self).__name__}, which needs {sorted(self.state())}: "
                "resume with the class that wrote it"
            )
        changes: dict[str, Any] = {name: state[name] for name in self.moving()}
        for outer, inner in self._inner():
            start = f"{outer}."
            own = {name.removeprefix(start): number for name, number in state.items() if name.startswith(start)}
            field, _, place = outer.partition(".")
            if place:
                several = changes.get(field, getattr(self, field))
                index = int(place)
                changes[field] = (*several[:index], inner.restored(own), *several[index + 1 :])
            else:
                changes[field] = inner.restored(own)
        return replace(self, **changes)

    def _inner(self) -> list[tuple[str, Adaptive]]:
        """Return the settings inside this one by field name, those of a tuple as `field.place`."""
        named: list[tuple[str, Any]] = []
        for field in fields(self):
            value = getattr(self, field.name)
            several = isinstance(value, tuple)
            named += [(f"{field.name}.{i}", one) for i, one in enumerate(value)] if several else [(field.name, value)]
        return [(name, inner) for name, inner in named if isinstance(inner, Adaptive)]
