"""Which sequences each optimizer step of a rollout learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.rollout.pieces import at_least, pieces_of
from lightning_rlhf.types import Experience, Rollout, TextBatch

Minibatch = tuple[Experience, TextBatch | None]
Agree = Callable[[int], int]
"""From the pieces one process has to those that all must have: a sharded network needs all of them in every pass."""


def alone(count: int) -> int:
    """No other process need make as many passes."""
    return count


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Inner epochs, minibatches and microbatches of one rollout. All sizes count sequences per process."""

    epochs: int = 1
    """How often a rollout is learned from; InstructGPT's RL stage uses 1."""
    minibatch: int | None = None
    """Sequences per optimizer step; None takes the whole rollout. Must divide the rollout."""
    microbatch: int | None = None
    """Sequences per forward and backward; None takes the whole minibatch. Changes memory, never the result."""
    microbatch_tokens: int | None = None
    """Tokens per forward and backward, padding included, instead of `microbatch`: short sequences go through together.
    A longer sequence goes alone."""
    max_grad_norm: float | None = 1.0
    """Norm to which gradients are clipped; None does not clip."""

    def __post_init__(self) -> None:
        names = ("minibatch", "microbatch", "microbatch_tokens", "max_grad_norm")
        named = {name: getattr(self, name) for name in names}
        check_positive(epochs=self.epochs, **{name: value for name, value in named.items() if value is not None})
        if self.microbatch is not None and self.microbatch_tokens is not None:
            raise ValueError(
                f"a microbatch is limited by sequences or by tokens: got microbatch={self.microbatch} and "
                f"microbatch_tokens={self.microbatch_tokens}; leave one out"
            )

    def steps(self, episodes: int) -> int:
        """Optimizer steps of a rollout of `episodes` sequences.

        Raises:
            ValueError: `minibatch` does not divide it.
        """
        size = self.minibatch or episodes
        if episodes % size:
            fits = [n for n in range(1, episodes + 1) if episodes % n == 0]
            nearest = min(fits, key=lambda n: abs(n - size))
            raise ValueError(
                f"`minibatch` must divide the rollout: got minibatch={size} for {episodes} sequences; use {nearest}"
            )
        return self.epochs * (episodes // size)

    def minibatches(self, experience: Experience, text: TextBatch | None, *, seed: int) -> Iterator[Minibatch]:
        """The experience and its share of the text, one optimizer step after the other.

        The first epoch keeps the order of the prompts, which the data loader has shuffled, so that processes cut the
        same minibatches as one process would; later epochs draw a fresh permutation. The text is cut alike in every
        epoch.

        Args:
            experience: one process's rollout.
            text: the pretraining texts of the whole rollout.
            seed: of the permutations, equal on all processes.
        """
        count = self.steps(len(experience)) // self.epochs
        generator = torch.Generator().manual_seed(seed)
        device = experience.advantages.device
        for epoch in range(self.epochs):
            order = torch.arange(len(experience))
            order = order if epoch == 0 else torch.randperm(len(experience), generator=generator)
            texts = split_text(text, count)
            for index, part in zip(order.chunk(count), texts, strict=True):
                yield experience.select(index.to(device)), part

    def pieces(self, rollout: Rollout, agree: Agree = alone) -> list[Tensor]:
        """Row numbers of each microbatch of the first epoch, (b,), int64, those of similar length together.

        What is measured of these very pieces before the updates is what the first epoch measures, to the bit, although
        kernels of low precision round differently in other company.

        Args:
            rollout: B responses.
            agree: how many pieces a minibatch must have.
        """
        rows = torch.arange(len(rollout), device=rollout.tokens.device)
        minibatches = rows.chunk(self.steps(len(rollout)) // self.epochs)
        return [rows[piece] for rows in minibatches for piece in self.split(rollout.select(rows), agree)]

    def split(self, rollout: Rollout, agree: Agree = alone) -> list[Tensor]:
        """Row numbers of each microbatch, (b,), int64, those of similar length together.

        Args:
            rollout: a minibatch, or what nothing is learned from.
            agree: how many pieces there must be.
        """
        found = pieces_of(rollout, rows=self.microbatch, tokens=self.microbatch_tokens)
        return at_least(found, agree(len(found)))

    def microbatches(self, experience: Experience, text: TextBatch | None, agree: Agree = alone) -> list[Minibatch]:
        """A minibatch in pieces that fit in memory, those of similar length together.

        Args:
            experience: a minibatch.
            text: its pretraining texts.
            agree: how many pieces there must be.
        """
        order = self.split(experience.rollout, agree)
        return list(zip((experience.select(index) for index in order), split_text(text, len(order)), strict=True))


def split_text(text: TextBatch | None, parts: int) -> list[TextBatch | None]:
    """Consecutive, nearly equal shares of the rows; None for an empty share."""
    if text is None:
        return [None] * parts
    shares = [TextBatch(*fields) for fields in zip(*(field.tensor_split(parts) for field in text), strict=True)]
    return [share if len(share.tokens) else None for share in shares]
