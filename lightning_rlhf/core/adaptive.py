"""Values that adapt: they never change, they return their successor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """A frozen setting of which some numbers move during training.

    State is Python floats and not buffers, because precision plugins cast float buffers (bf16: 1.0 · 1.001 = 1.0).
    """

    def state(self) -> dict[str, float]:
        """The fields that move, by name: what a checkpoint holds. None here."""
        return {}

    def restored(self, state: dict[str, float]) -> Self:
        """The same setting with the moving fields of a checkpoint.

        Raises:
            ValueError: `state` names other fields than this object moves.
        """
        if state.keys() != self.state().keys():
            raise ValueError(
                f"the checkpoint holds {sorted(state)} for {type(self).__name__}, which needs {sorted(self.state())}: "
                "resume with the class that wrote it"
            )
        return replace(self, **state)
