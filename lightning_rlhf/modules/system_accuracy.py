"""Accuracy of a reward model by the system that wrote the responses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.modules.length_bias import longer_wins


class SystemAccuracy:
    """Accuracy over the pairs that hold a response of a system, per system named in the data.

    A pair of two systems counts for both, a pair within one system once. Beside it stands the accuracy of preferring
    the longer response on the same pairs, because systems differ in length.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def begin(self) -> None:
        """Reset the counts of all systems."""
        self._sums = {}

    def update(self, margins: Tensor, longer: Tensor, pairs: Tensor, systems: Sequence[Sequence[str]]) -> None:
        """Add the N pairs of B prompts.

        Args:
            margins: r_w − r_l, (N,), in the order of `pairs`.
            longer: length of the preferred response less that of the other, (N,), tokens.
            pairs: which responses (w, l) they are of, (B, K, K), bool.
            systems: the names of each prompt's responses; a prompt without names counts nowhere.
        """
        if not any(systems):
            return
        numbers = torch.stack([torch.ones_like(longer), margins > 0, longer_wins(longer)], 1).tolist()
        self._sums = _added(
            self._sums,
            (
                (name, entry)
                for (prompt, better, worse), entry in zip(pairs.nonzero().tolist(), numbers, strict=True)
                if (names := systems[prompt])
                for name in {names[better], names[worse]}
            ),
        )

    def compute(self, module: LightningModule) -> dict[str, float]:
        """Return `accuracy/NAME`, `longer_wins/NAME` and `pairs/NAME`; every process must call this.

        Args:
            module: whose trainer's processes.
        """
        lines = (
            Ranks(module).gather_text("".join(json.dumps(entry) + "\n" for entry in self._sums.items())).splitlines()
        )
        values = {}
        for name, (pairs, right, wins) in sorted(_added({}, map(json.loads, lines)).items()):
            values |= {f"accuracy/{name}": right / pairs, f"longer_wins/{name}": wins / pairs, f"pairs/{name}": pairs}
        return values


def _added(sums: dict[str, list[float]], entries: Iterable[tuple[str, list[float]]]) -> dict[str, list[float]]:
    """Add entries to the sums of the same names."""
    sums = dict(sums)
    for name, numbers in entries:
        sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), numbers, strict=True)]
    return sums
