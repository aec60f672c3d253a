"""Metrics that outlive an evaluation."""

from __future__ import annotations

import torch
from torchmetrics import Metric


def begin(*metrics: Metric) -> None:
    """Empty the metrics, in tensors that training may write to: `validate` and `test` run in inference mode."""
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()
