"""Shaping rules that turn a score into a reward, applied in turn.

They act on length, missing ends and size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from lightning_rlhf.core.adaptive import Adaptive
from lightning_rlhf.core.checks import check_finite, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class Shaping(Adaptive, ABC):
    """Base class of rules for the score of a response."""

    @abstractmethod
    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Apply the rule to the scores.

        Args:
            scores: (B,), float, reward units.
            lengths: tokens of each response, end token included, (B,), int64, ≥ 1.
            ended: the response closed with an end token, (B,), bool.

        Returns:
            (B,).
        """

    def for_length(self, max_new_tokens: int) -> Self:
        """Return the rule with the longest response (in tokens) filled in if it needs one."""
        return self

    def adapted(self, mean: float, variance: float, count: int) -> Self:
        """Return the rule of the next rollout.

        Args:
            mean: of the rollout's scores before any rule, over all processes, reward units.
            variance: of these, Σ(score − mean)² / count.
            count: how many they are.

        Returns:
            the successor; itself unless the class adapts.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class TruncatedScore(Shaping):
    """Fixed score of a response without end token (Ziegler et al. 2019, code; Huang et al. 2024, detail 23)."""

    value: float = -1.0
    """Reward units, after normalization of the reward."""

    def __post_init__(self) -> None:
        check_finite(value=self.value)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Return `value` where the response did not end and the score elsewhere."""
        return torch.where(ended, scores, torch.full_like(scores, self.value))


@dataclass(frozen=True, kw_only=True)
class MissingEOSPenalty(Shaping):
    """Penalty on the score of a response without end token (TRL's `missing_eos_penalty`)."""

    penalty: float = 1.0
    """Reward units, ≥ 0; with 0 the score stands as it is."""

    def __post_init__(self) -> None:
        check_not_negative(penalty=self.penalty)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Subtract `penalty` where the response did not end."""
        return torch.where(ended, scores, scores - self.penalty)


@dataclass(frozen=True, kw_only=True)
class SoftOverlong(Shaping):
    """Penalty that grows over the last tokens before the limit (DAPO; Yu et al. 2025, eq. 13).

    0 up to `limit` − `buffer` tokens, −penalty·(|y| − limit + buffer)/buffer up to `limit`, −penalty beyond.
    """

    limit: int | None = None
    """L_max, tokens; None is the generation's `max_new_tokens`."""
    buffer: int | None = None
    """L_c, tokens, in [1, `limit`]; None is a fifth of `limit`, as the paper's 4,096 of 20,480."""
    penalty: float = 1.0
    """Reward units, > 0; the paper's is 1."""

    def __post_init__(self) -> None:
        named = {"limit": self.limit, "buffer": self.buffer, "penalty": self.penalty}
        check_positive(**{name: number for name, number in named.items() if number is not None})
        if self.limit is not None and self.buffer is not None and self.buffer > self.limit:
            raise ValueError(f"`buffer` must not exceed `limit`: got {self.buffer} of {self.limit} tokens")

    def for_length(self, max_new_tokens: int) -> Self:
        """Return the rule with `limit` and `buffer` in tokens."""
        limit = max_new_tokens if self.limit is None else self.limit
        return replace(self, limit=limit, buffer=max(limit // 5, 1) if self.buffer is None else self.buffer)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Subtract `penalty` times the used share of the buffer.

        Raises:
            ValueError: `limit` or `buffer` is still None.
        """
        if self.limit is None or self.buffer is None:
            raise ValueError(
                "`SoftOverlong` needs `limit` and `buffer`, in tokens: set them, or call `for_length` first"
            )
        used = (lengths - (self.limit - self.buffer)).to(scores.dtype) / self.buffer
        return scores - self.penalty * used.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LengthPenalty(Shaping):
    """Price on every token against rewards that like length (Singhal et al. 2023): score − coef·|y|."""

    coef: float
    """Reward units per token, > 0."""

    def __post_init__(self) -> None:
        check_positive(coef=self.coef)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Compute score − coef·|y| for each response."""
        return scores - self.coef * lengths.to(scores.dtype)


@dataclass(frozen=True, kw_only=True)
class LengthNormalized(Shaping):
    """Score per token in units of a response of `length` tokens: score · (length / |y|).

    A response below 0 gains by being longer: take it for rewards that count something, or shift them above 0 first.
    """

    length: float = 1.0
    """Tokens, > 0: a response this long keeps its score."""

    def __post_init__(self) -> None:
        check_positive(length=self.length)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Compute score · length / |y|."""
        return scores * (self.length / lengths.to(scores.dtype))


@dataclass(frozen=True, kw_only=True)
class ClipScore(Shaping):
    """Score clamped to [low, high], so that no single response steers a batch."""

    low: float = -5.0
    """Lower bound, reward units, below `high`."""
    high: float = 5.0
    """Upper bound, reward units."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`: got {self.low} and {self.high}")

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Clamp the score to [low, high]."""
        return scores.clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class RunningNormalized(Shaping):
    """Score in standard deviations of all scores of the rollouts before, with their mean taken off.

    (Engstrom et al. 2020, 2005.12729; OpenRLHF's `--reward.normalize_enable`.) The scores of a rollout take no part in
    their own unit; those of the first stay as they are. It comes before other rules. Evaluations stay in reward units.
    """

    center: bool = True
    """Whether the mean is taken off."""
    mean: float = 0.0
    """Mean of the scores so far, reward units."""
    squares: float = 0.0
    """Σ(score − mean)² of them, ≥ 0."""
    count: float = 0.0
    """How many they are, ≥ 0."""

    def __post_init__(self) -> None:
        check_finite(mean=self.mean)
        check_not_negative(squares=self.squares, count=self.count)

    def __call__(self, scores: Tensor, *, lengths: Tensor, ended: Tensor) -> Tensor:
        """Compute (score − mean) / (std + 1e-8)."""
        if self.count < 2:
            return scores
        spread = (self.squares / (self.count - 1)) ** 0.5 + 1e-8
        return (scores - (self.mean if self.center else 0.0)) / spread

    def moving(self) -> tuple[str, ...]:
        """Names of the statistics."""
        return ("mean", "squares", "count")

    def adapted(self, mean: float, variance: float, count: int) -> Self:
        """Return the rule with one more rollout in its statistics (Chan et al. 1983).

        Raises:
            ValueError: the statistics are not finite.
        """
        check_finite(mean=mean, variance=variance)
        whole, distance = self.count + count, mean - self.mean
        return replace(
            self,
            mean=self.mean + distance * count / whole,
            squares=self.squares + variance * count + distance**2 * self.count * count / whole,
            count=whole,
        )
