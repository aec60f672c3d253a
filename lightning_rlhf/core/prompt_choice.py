"""Choice of the prompts whose responses are learned from: dynamic sampling and a curriculum."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_finite, check_positive, check_unit_interval


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Dynamic sampling: batches are drawn until enough prompts have responses of different scores.

    (DAPO; Yu et al. 2025, 2503.14476, §3.2.) A group whose responses all score the same has advantages of 0: it costs
    tokens and teaches nothing. Scores are compared as the reward gave them, before shaping. A rollout keeps its size:
    what is still missing at the cap is filled with such groups. The reward sees responses before their log-probs are
    measured.
    """

    batches: int = 10
    """Most batches drawn for one rollout, ≥ 1; with 1 groups are left out and none is drawn again."""
    keep_flat: bool = False
    """At the cap, whether the groups of equal scores that fill a rollout count in the loss's denominators, as they do
    without dynamic sampling; otherwise they count nowhere in the update."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(batches=self.batches)


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Curriculum by running pass rate: prompts that are always or never solved leave for a while.

    m ← d·m + (1 − d)·p, with p the share of a prompt's responses that are solved, m = p at first. Where m is at one of
    the bounds, the prompt is not drawn for `rest` rollouts, and another one takes its place.
    """

    solved: float = 1.0
    """Score, before shaping, from which on a response is solved, reward units."""
    decay: float = 0.5
    """d in [0, 1): 0 looks at the last time alone."""
    low: float = 0.0
    """Running pass rate at and below which a prompt rests, in [0, `high`)."""
    high: float = 1.0
    """Running pass rate at and above which a prompt rests, at most 1."""
    rest: int = 20
    """Rollouts without the prompt, > 0."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_finite(solved=self.solved)
        check_unit_interval(decay=self.decay, low=self.low, high=self.high)
        check_positive(rest=self.rest)
        if self.decay == 1:
            raise ValueError("`decay` must be below 1: with 1 the pass rate would never move")
        if not self.low < self.high:
            raise ValueError(f"`low` must be below `high`: got {self.low} and {self.high}")

    def moved(self, rate: float | None, share: float) -> float:
        """Return the running pass rate after one more time.

        Args:
            rate: before; None at first.
            share: of the prompt's responses that were solved this time, in [0, 1].
        """
        return share if rate is None else self.decay * rate + (1 - self.decay) * share

    def rests(self, rate: float) -> bool:
        """Return True if a prompt of this running pass rate leaves for a while."""
        return rate <= self.low or rate >= self.high
