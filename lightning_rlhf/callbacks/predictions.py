"""Responses of `predict` as JSONL."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_rlhf.callbacks.writable import check_writable, place_of


class PredictionWriter(BasePredictionWriter):
    """Writes one line per prompt: its record with the keys `response, score, kl, length, ended`.

    Values without a form in JSON are converted: bytes as base64; dates and times as in ISO 8601; durations, decimals,
    UUIDs and infinite numbers as text; NaN as null; NumPy's and torch's as numbers and lists. A record with anything
    else is refused before its prompt is answered.

    Args:
        path: of the file, replaced whole when prediction ends; None is `responses.jsonl` in the trainer's
            `default_root_dir`. With several processes each writes its own, the rank
            before the suffix (`responses.rank1.jsonl`).

    Raises:
        ValueError: at the start of prediction, the path is a folder's or cannot be written to.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path
        self.place: Path = None  # type: ignore[assignment]  # until `setup`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before prediction that the file can be written.

        Raises:
            ValueError: its path is a folder's, or cannot be written to.
        """
        super().setup(trainer, pl_module, stage)
        self.place = place_of(trainer, self.path, "responses.jsonl")
        if stage != "predict":
            return
        if self.place.is_dir():
            raise ValueError(f"`path`: {self.place} is a folder: give the name of a file in it")
        check_writable(trainer, self.place.parent, argument="path")

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Refuse records that could not be written.

        Raises:
            TypeError: a value has no form in JSON.
        """
        for row in getattr(batch, "rows", ()):
            _line(row)

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all predictions to a temporary name and rename the file."""
        path = self.place
        if trainer.world_size > 1:
            path = path.with_suffix(f".rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half a surrogate pair
            for record in _records(predictions):
                file.write(_line(record))
        partial.replace(path)


def _records(predictions: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Flatten lists of batches or of loaders of batches into records."""
    for entry in predictions:
        if isinstance(entry, dict):
            yield entry
        else:
            yield from _records(entry)


def _line(record: Mapping[str, Any]) -> str:
    written = {}
    for key, value in record.items():
        try:
            written[key] = _json(value)
        except TypeError as error:
            raise TypeError(f"the column `{key}` can't be written with a prediction: {error}; leave it out") from error
    return json.dumps(written, ensure_ascii=False, allow_nan=False) + "\n"


def _json(value: Any) -> Any:
    """Convert a value to a form that JSON has.

    Raises:
        TypeError: there is none.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta | Decimal | UUID):
        return str(value)
    if hasattr(value, "tolist"):  # of NumPy or torch
        return _json(value.tolist())
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
