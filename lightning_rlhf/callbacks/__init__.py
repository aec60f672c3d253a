"""What happens around the training loop: averaging, checkpoints, export, prediction files."""

from lightning_rlhf.callbacks.checkpoint import RunCheckpoint
from lightning_rlhf.callbacks.ema import EMA
from lightning_rlhf.callbacks.export import Export
from lightning_rlhf.callbacks.predictions import PredictionWriter

__all__ = ["EMA", "Export", "PredictionWriter", "RunCheckpoint"]
