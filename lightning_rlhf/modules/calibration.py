"""Calibration of a reward model's confidence."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lightning_rlhf.modules.metrics import Sums, binned

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the bins of confidence. Each bin holds its lower edge, the last also its upper one."""
NAMES = tuple(f"{100 * low:.0f}_{100 * high:.0f}" for low, high in pairwise(EDGES))


class Calibration(Sums):
    """Accuracy by confidence: in a calibrated model the preferred response scores higher as often as it claims.

    confidence = σ(|r_w − r_l|), the probability that Bradley and Terry (1952) give to the response of higher score
    calibration_error = Σ_bins (pairs in the bin / pairs) · |accuracy − mean confidence| (Guo et al. 2017)

    Equal scores are of confidence ½ and wrong.
    """

    def __init__(self) -> None:
        super().__init__(len(NAMES), 3)

    def update(self, margins: Tensor) -> None:
        """Take in r_w − r_l of N pairs, (N,)."""
        margins = margins.detach().double()
        confidence = margins.abs().sigmoid()
        bins = torch.bucketize(confidence, confidence.new_tensor(EDGES[1:-1]), right=True)
        self.sums += binned(bins, len(NAMES), margins > 0, confidence)

    def compute(self) -> dict[str, Tensor]:
        """Return the calibration error, and the accuracy and mean confidence of each bin with a pair."""
        pairs, correct, confidence = self.sums.T
        values = {"calibration_error": (correct - confidence).abs().sum() / pairs.sum()}
        for name, (n, right, sure) in zip(NAMES, self.sums, strict=True):
            if n:
                values[f"accuracy_confidence_{name}"] = right / n
                values[f"mean_confidence_{name}"] = sure / n
                values[f"pairs_confidence_{name}"] = n
        return values
