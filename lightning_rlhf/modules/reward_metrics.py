"""Metrics of a reward model over a whole evaluation and all processes, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import one_hot
from torchmetrics import Metric

from lightning_rlhf.distributed.ranks import Ranks


def begin(*metrics: Metric) -> None:
    """Reset metrics to tensors that training may write to: `validate` and `test` run in inference mode."""
    with torch.inference_mode(False):
        for metric in metrics:
            metric.reset()


class Sums(Metric):
    """Base class of metrics that are functions of sums over all processes.

    Args:
        shape: of `sums`.
    """

    full_state_update = False
    sums: Tensor
    """The sums, of `shape`, float64."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Sums:
        """Move the sums to the module's device but keep their dtype: a count in bfloat16 stops at 256."""
        super()._apply(fn, exclude_state)
        self.sums, self._defaults["sums"] = self.sums.double(), self._defaults["sums"].double()  # type: ignore[union-attr]
        return self


class Mean(Sums):
    """Mean of all numbers seen, each with the same weight."""

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, values: Tensor) -> None:
        """Add numbers or booleans of any shape."""
        values = values.detach().double()
        self.sums += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def compute(self) -> Tensor:
        """Return the mean; NaN if no number was added."""
        return self.sums[0] / self.sums[1]


def binned(bins: Tensor, count: int, *quantities: Tensor) -> Tensor:
    """Count the observations and sum each quantity per bin, (count, 1 + quantities), in float64.

    Args:
        bins: the bin of each of N observations, (N,), int64.
        count: how many bins there are.
        quantities: numbers or truth values, (N,) each.
    """
    rows = torch.stack([torch.ones_like(bins), *quantities], 1).double()
    return one_hot(bins, count).double().T @ rows


EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Edges of the bins of confidence. Each bin holds its lower edge, the last also its upper one."""
BINS = tuple(f"{100 * low:.0f}_{100 * high:.0f}" for low, high in pairwise(EDGES))


class Calibration(Sums):
    """Accuracy by confidence: in a calibrated model the preferred response scores higher as often as it claims.

    confidence = σ(|r_w − r_l|), the probability that Bradley and Terry (1952) give to the response of higher score
    calibration_error = Σ_bins (pairs in the bin / pairs) · |accuracy − mean confidence| (Guo et al. 2017)

    Equal scores are of confidence ½ and wrong.
    """

    def __init__(self) -> None:
        super().__init__(len(BINS), 3)

    def update(self, margins: Tensor) -> None:
        """Take in r_w − r_l of N pairs, (N,)."""
        margins = margins.detach().double()
        confidence = margins.abs().sigmoid()
        bins = torch.bucketize(confidence, confidence.new_tensor(EDGES[1:-1]), right=True)
        self.sums += binned(bins, len(BINS), margins > 0, confidence)

    def compute(self) -> dict[str, Tensor]:
        """Return the calibration error, and the accuracy and mean confidence of each bin with a pair."""
        pairs, correct, confidence = self.sums.T
        values = {"calibration_error": (correct - confidence).abs().sum() / pairs.sum()}
        for name, (n, right, sure) in zip(BINS, self.sums, strict=True):
            if n:
                values[f"accuracy_confidence_{name}"] = right / n
                values[f"mean_confidence_{name}"] = sure / n
                values[f"pairs_confidence_{name}"] = n
        return values


SIMILAR = 10
"""Largest difference in tokens at which two responses count as about as long."""
NAMES = ("shorter", "similar", "longer")


def longer_wins(longer: Tensor) -> Tensor:
    """Return 1 if the longer response of a pair is preferred, ½ for equal lengths; otherwise 0.

    Args:
        longer: length of the preferred response less that of the other, any shape.
    """
    return (longer.sign().double() + 1) / 2


class LengthAccuracy(Sums):
    """Accuracy by length difference: a model biased towards length fails on shorter preferred responses.

    longer and shorter by more than `SIMILAR` tokens, similar otherwise; the prompt cancels in the difference. A model
    has learned something beside length where its accuracy is above `longer_wins`, that of preferring the longer one.
    """

    def __init__(self) -> None:
        super().__init__(len(NAMES), 3)

    def update(self, margins: Tensor, longer: Tensor) -> None:
        """Add the pairs of a batch, N of them.

        Args:
            margins: r_w − r_l, (N,).
            longer: length of the preferred response less that of the other, (N,), int64, tokens.
        """
        bins = torch.bucketize(longer, longer.new_tensor([-SIMILAR, SIMILAR + 1]), right=True)
        self.sums += binned(bins, len(NAMES), margins > 0, longer_wins(longer))

    def compute(self) -> dict[str, Tensor]:
        """Return `longer_wins`, and the accuracy and number of pairs of each bin with a pair."""
        pairs, _, wins = self.sums.sum(0)
        values = {"longer_wins": wins / pairs}
        for name, (n, right, _) in zip(NAMES, self.sums, strict=True):
            if n:
                values |= {f"accuracy_{name}": right / n, f"pairs_{name}": n}
        return values


class LengthCorrelation(Sums):
    """Pearson correlation of score and length in tokens, over all responses and within prompts.

    ρ = (n Σrℓ − Σr Σℓ) / √((n Σr² − (Σr)²)(n Σℓ² − (Σℓ)²))

    Over all responses ℓ holds the prompt, and r a constant per prompt that preferences leave free; within prompts both
    are deviations from the mean of the prompt's responses, which takes these out.
    """

    def __init__(self) -> None:
        super().__init__(2, 6)

    def update(self, scores: Tensor, lengths: Tensor, present: Tensor) -> None:
        """Add the responses to a batch of B prompts.

        Args:
            scores: (B, K).
            lengths: of prompt + response + end token, (B, K), int64, tokens.
            present: responses that count, (B, K), bool.
        """
        both = torch.stack([scores.detach().double(), lengths.double()])
        means = torch.where(present, both, 0.0).sum(2, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        within = both - means
        self.sums += torch.stack([_moments(*pair[:, present]) for pair in (both, within)])

    def compute(self) -> dict[str, Tensor]:
        """Return `score_length_correlation` and `…_within_prompt`, each only if neither quantity is constant."""
        names = ("score_length_correlation", "score_length_correlation_within_prompt")
        values = {name: _pearson(*sums) for name, sums in zip(names, self.sums, strict=True)}
        return {name: value for name, value in values.items() if value.isfinite()}


def _moments(x: Tensor, y: Tensor) -> Tensor:
    """Return the six sums (N, Σx, Σy, Σx², Σy², Σxy)."""
    return torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).sum(1)


def _pearson(n: Tensor, x: Tensor, y: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    """Return Pearson's correlation; NaN if a variance is only rounding error."""
    spread = torch.stack([n * xx - x * x, n * yy - y * y])
    varies = spread > 1e-12 * n * torch.stack([xx, yy])
    correlation = (n * xy - x * y) / spread.clamp(min=0).prod().sqrt()
    return torch.where(varies.all(), correlation, torch.nan).clamp(-1, 1)


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
        values: dict[str, float] = {}
        for name, (pairs, right, wins) in sorted(_added({}, map(json.loads, lines)).items()):
            values |= {f"accuracy/{name}": right / pairs, f"longer_wins/{name}": wins / pairs, f"pairs/{name}": pairs}
        return values


def _added(sums: dict[str, list[float]], entries: Iterable[tuple[str, list[float]]]) -> dict[str, list[float]]:
    """Add entries to the sums of the same names."""
    sums = dict(sums)
    for name, numbers in entries:
        sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), numbers, strict=True)]
    return sums
