"""Division of a rollout into epochs, minibatches and microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.models.microbatching import at_least, pieces_of
from lightning_rlhf.rollout.old_logprobs import OldLogprobs
from lightning_rlhf.types import Experience, Rollout, TextBatch

Minibatch = tuple[Experience, TextBatch | None]
Agree = Callable[[int], int]
"""Map of one process's number of pieces to the number that all run: every pass of a sharded network needs all."""


def alone(count: int) -> int:
    """Return the count unchanged: no other process has to run as many passes."""
    return count


@dataclass(frozen=True, kw_only=True)
class UpdateSchedule:
    """Inner epochs, minibatches and microbatches of one rollout. All sizes count sequences per process."""

    epochs: int = 1
    """Number of passes over a rollout; InstructGPT's RL stage uses 1."""
    minibatch: int | None = None
    """Sequences per optimizer step; None takes the whole rollout. Divides the rollout, unless that is smaller."""
    microbatch: int | None = None
    """Responses, or pretraining texts, per forward and backward; None takes the whole minibatch. Changes memory, never
    the result."""
    microbatch_tokens: int | None = None
    """Tokens per forward and backward, instead of `microbatch`: short sequences go through together. A longer sequence
    goes alone. Padding counts, unless `packing` leaves it out."""
    packing: bool = False
    """Leave padding out of all passes of policy, reference and value network: the tokens of a microbatch stand in one
    row, and attention alone tells sequences apart. Changes speed, the result only by rounding. A network that might mix
    them is refused."""
    max_grad_norm: float | None = 1.0
    """Norm to which gradients are clipped; None does not clip."""
    old_logprobs: OldLogprobs | None = None
    """Source of the ratio's log π_old; None takes the cheapest that is exact and logs which."""

    def __post_init__(self) -> None:
        check_fields(self)
        names = ("minibatch", "microbatch", "microbatch_tokens", "max_grad_norm")
        named = {name: getattr(self, name) for name in names}
        check_positive(epochs=self.epochs, **{name: value for name, value in named.items() if value is not None})
        if self.microbatch is not None and self.microbatch_tokens is not None:
            raise ValueError(
                f"a microbatch is limited by sequences or by tokens: got microbatch={self.microbatch} and "
                f"microbatch_tokens={self.microbatch_tokens}; leave one out"
            )

    def steps(self, episodes: int) -> int:
        """Number of optimizer steps of a rollout of `episodes` sequences.

        Raises:
            ValueError: `minibatch` is smaller and does not divide it.
        """
        size = min(self.minibatch or episodes, episodes)
        if episodes % size:
            fits = [n for n in range(1, episodes + 1) if episodes % n == 0]
            nearest = min(fits, key=lambda n: abs(n - size))
            raise ValueError(
                f"`minibatch` must divide the rollout: got minibatch={size} for {episodes} sequences; use {nearest}"
            )
        return self.epochs * (episodes // size)

    def minibatches(
        self, experience: Experience, text: TextBatch | None, *, seed: int, rank: int = 0, world: int = 1
    ) -> Iterator[Minibatch]:
        """Yield the experience and its share of the text for one optimizer step after the other.

        The first epoch keeps the order of the prompts, which the data loader has shuffled; later epochs draw a fresh
        permutation of the responses of all processes. So several processes together cut the minibatches of one. In
        later epochs a process's part of one may be larger than another's, or a response of which nothing counts. The
        text is cut alike in every epoch.

        Args:
            experience: one process's rollout.
            text: the pretraining texts of the whole rollout.
            seed: of the permutations, equal on all processes.
            rank: this process.
            world: processes, to which prompts were dealt in turn.
        """
        count = self.steps(len(experience)) // self.epochs
        generator = torch.Generator().manual_seed(seed)
        device = experience.advantages.device
        places = _places(experience.rollout, rank, world)
        for epoch in range(self.epochs):
            parts = torch.arange(len(experience)).chunk(count)
            if epoch > 0:
                order = torch.randperm(len(experience) * world, generator=generator)
                parts = tuple(_rows_at(places, positions) for positions in order.chunk(count))
            for rows, share in zip(parts, split_text(text, count), strict=True):
                part = experience.select((rows if len(rows) else torch.zeros(1, dtype=torch.int64)).to(device))
                yield part if len(rows) else part.unlearned(), share

    def pieces(self, rollout: Rollout, agree: Agree = alone) -> list[Tensor]:
        """Row numbers of each microbatch of the first epoch, (b,), int64; similar lengths together.

        Measuring these very pieces before the updates gives what the first epoch measures, to the bit. Otherwise
        kernels of low precision round differently in batches of other rows.

        Args:
            rollout: B responses.
            agree: how many pieces a minibatch must have.
        """
        rows = torch.arange(len(rollout), device=rollout.tokens.device)
        minibatches = rows.chunk(self.steps(len(rollout)) // self.epochs)
        return [rows[piece] for rows in minibatches for piece in self.split(rollout.select(rows), agree)]

    def split(self, rollout: Rollout, agree: Agree = alone) -> list[Tensor]:
        """Row numbers of each microbatch, (b,), int64; similar lengths together.

        Args:
            rollout: a minibatch, or what nothing is learned from.
            agree: how many pieces there must be.
        """
        limits = {"rows": self.microbatch, "tokens": self.microbatch_tokens}
        pieces = pieces_of(rollout, packed=self.packing, **limits)
        return at_least(pieces, agree(len(pieces)))

    def passes(
        self, experience: Experience, text: TextBatch | None, agree: Agree = alone
    ) -> list[Experience | TextBatch]:
        """List the microbatches of a minibatch's texts, then those of its responses; the last uses every network.

        Args:
            experience: a minibatch.
            text: its pretraining texts; None if there are none.
            agree: how many pieces there must be of either.
        """
        return [*self.text_microbatches(text, agree), *self.microbatches(experience, agree)]

    def microbatches(self, experience: Experience, agree: Agree = alone) -> list[Experience]:
        """Split a minibatch into pieces that fit in memory, with similar lengths together.

        Args:
            experience: a minibatch.
            agree: how many pieces there must be; of a row that comes again for that, no action counts.
        """
        pieces: list[Experience] = []
        seen: set[int] = set()
        for rows in self.split(experience.rollout, agree):
            piece = experience.select(rows)
            first = int(rows[0])
            pieces.append(piece.unlearned() if first in seen else piece)
            seen.add(first)
        return pieces

    def text_microbatches(self, text: TextBatch | None, agree: Agree = alone) -> list[TextBatch]:
        """Split pretraining texts into pieces that fit in memory.

        Args:
            text: those of a minibatch; None if there are none.
            agree: how many pieces there must be; of a text that comes again for that, no token counts.
        """
        if text is None:
            return []
        count, width = text.tokens.shape
        size = count
        if self.microbatch_tokens is not None:
            size = max(self.microbatch_tokens // width, 1)
        elif self.microbatch is not None:
            size = self.microbatch
        again = text._replace(target=torch.zeros_like(text.target))
        filler = TextBatch(*(field[:1] for field in again))
        return [filler if piece is None else piece for piece in split_text(text, agree(-(-count // size)))]


def _places(rollout: Rollout, rank: int, world: int) -> Tensor:
    """Position of each response of this process among those of all, (B,), int64 on the CPU."""
    rows, prompts = torch.arange(len(rollout)), rollout.prompt_index.cpu()
    samples = len(rollout) // (int(prompts.max()) + 1)
    return (prompts * world + rank) * samples + rows % samples


def _rows_at(places: Tensor, positions: Tensor) -> Tensor:
    """Select this process's rows among those at `positions`, in their order."""
    matches = (positions[:, None] == places[None, :]).nonzero()
    return matches[:, 1]


def split_text(text: TextBatch | None, parts: int) -> list[TextBatch | None]:
    """Split the rows into consecutive, nearly equal shares; None for an empty share."""
    if text is None:
        return [None] * parts
    shares = [TextBatch(*fields) for fields in zip(*(field.tensor_split(parts) for field in text), strict=True)]
    return [share if len(share.tokens) else None for share in shares]
