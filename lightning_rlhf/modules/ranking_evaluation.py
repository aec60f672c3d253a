"""Evaluation of scored rankings: one set of metrics for reward models and policies trained on preferences."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rlhf.core import preferred_pairs, score_margins
from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.modules.reward_metrics import (
    Calibration,
    LengthAccuracy,
    LengthCorrelation,
    Mean,
    SystemAccuracy,
    begin,
)
from lightning_rlhf.types import ComparisonBatch


class RankingEvaluation(nn.Module):
    """Metrics of scored rankings: accuracy (also by confidence or length or system), margin and loss.

    All are over a whole evaluation and all processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.margin, self.loss = Mean(), Mean(), Mean()
        self.calibration = Calibration()
        self.length_accuracy, self.length_correlation = LengthAccuracy(), LengthCorrelation()
        self.system_accuracy = SystemAccuracy()

    def begin(self) -> None:
        """Reset all metrics."""
        begin(*(metric for metric in self.children() if isinstance(metric, Metric)))
        self.system_accuracy.begin()

    def update(self, scores: Tensor, losses: Tensor, batch: ComparisonBatch, counts: Tensor) -> None:
        """Add a batch.

        Args:
            scores: of each response, (B, K), reward units.
            losses: of each prompt, (B,).
            batch: B prompts.
            counts: prompts whose loss counts, (B,), bool.
        """
        pairs, lengths = preferred_pairs(batch.rank), batch.mask.sum(2)
        if counts.any():
            self.loss.update(losses[counts])
        if not pairs.any():
            return
        margins, longer = score_margins(scores)[pairs], score_margins(lengths)[pairs]
        self.accuracy.update(margins > 0)
        self.margin.update(margins)
        self.calibration.update(margins)
        self.length_accuracy.update(margins, longer)
        self.length_correlation.update(scores, lengths, pairs.any(1) | pairs.any(2))
        self.system_accuracy.update(margins, longer, pairs, batch.systems)

    def compute(self, module: LightningModule) -> dict[str, Any]:
        """Return the numbers by name, without those that no process has data for; every process must call this.

        Args:
            module: whose trainer's processes.
        """
        values: dict[str, Any] = {"loss": self.loss.compute()} if seen(module, self.loss) else {}
        if not seen(module, self.accuracy):
            return values
        values |= {"accuracy": self.accuracy.compute(), "margin": self.margin.compute()}
        for metric in (self.calibration, self.length_accuracy, self.length_correlation):
            values |= metric.compute()  # its names follow from sums over all processes, so that all log the same
        return values | self.system_accuracy.compute(module)


def seen(module: LightningModule, metric: Metric) -> bool:
    """Return True if any process has data for a metric: all of them must compute it, or none."""
    return bool(Ranks(module).sum(torch.tensor(float(metric.update_called), device=module.device)))
