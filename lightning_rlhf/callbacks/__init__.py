"""Callbacks around the training loop (averaging, checkpoints, preflight, guards, export, logs of responses)."""

from lightning_rlhf.callbacks.checkpoint import RunCheckpoint
from lightning_rlhf.callbacks.ema import EMA
from lightning_rlhf.callbacks.export import Export
from lightning_rlhf.callbacks.gradient_norms import GradientNorms
from lightning_rlhf.callbacks.kl_action import GuardAction, RaiseKL, RollBack, StopTraining
from lightning_rlhf.callbacks.kl_guard import KLGuard
from lightning_rlhf.callbacks.moving_reference import MovingReference
from lightning_rlhf.callbacks.nonfinite import NonFiniteGuard
from lightning_rlhf.callbacks.predictions import PredictionWriter
from lightning_rlhf.callbacks.preflight import Preflight
from lightning_rlhf.callbacks.report import Report
from lightning_rlhf.callbacks.rollout_log import RolloutLog
from lightning_rlhf.callbacks.rollout_progress import RolloutProgress
from lightning_rlhf.callbacks.sample_log import SampleLog

__all__ = [
    "EMA",
    "Export",
    "GradientNorms",
    "GuardAction",
    "KLGuard",
    "MovingReference",
    "NonFiniteGuard",
    "PredictionWriter",
    "Preflight",
    "RaiseKL",
    "Report",
    "RollBack",
    "RolloutLog",
    "RolloutProgress",
    "RunCheckpoint",
    "SampleLog",
    "StopTraining",
]
