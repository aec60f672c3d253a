"""`predict` writes responses as JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """One line per prompt: its record with `response`, `score`, `kl`, `length` and `ended`.

    Args:
        path: of the file, replaced whole when prediction ends. With several processes each writes its own, the rank
            before the suffix (`responses.rank1.jsonl`).
    """

    def __init__(self, path: str = "responses.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write to a temporary name and rename."""
        path = Path(self.path)
        if trainer.world_size > 1:
            path = path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with partial.open("w", encoding="utf-8") as file:
            for record in _records(predictions):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        partial.replace(path)


def _records(predictions: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """The records in lists of batches, or in lists of loaders of batches."""
    for entry in predictions:
        if isinstance(entry, dict):
            yield entry
        else:
            yield from _records(entry)
