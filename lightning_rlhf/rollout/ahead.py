"""Rollout that is drawn ahead of its step, in another thread while the policy learns from the one before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.types import PromptBatch


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """Responses that are being drawn.

    Attributes:
        iteration: rollout they are for.
        keys: of the prompts they answer, (B,), int64.
        sampled: the responses, once they are there.
        problem: why they are not.
    """

    iteration: int
    keys: Tensor
    sampled: Sampled | None = None
    problem: Exception | None = None


class Ahead:
    """At most one rollout ahead of its step.

    Args:
        ranks: prompt i of this process is prompt i·world + rank of the whole batch.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._flight: Flight | None = None
        self._thread: threading.Thread | None = None
        self._saved: dict[str, Any] | None = None

    def start(self, draw: Callable[[], Sampled], prompts: PromptBatch, *, iteration: int) -> None:
        """Draw in another thread.

        Args:
            draw: draws the responses; an EngineError of it is raised by `take`.
            prompts: that are answered.
            iteration: rollout they are for.
        """
        flight = Flight(iteration=iteration, keys=keys_of(prompts))

        def run() -> None:
            try:
                with torch.no_grad():
                    flight.sampled = draw()
            except Exception as error:
                flight.problem = error

        self._flight = flight
        self._thread = threading.Thread(target=run, name="lightning_rlhf rollout", daemon=True)
        self._thread.start()

    def land(self) -> None:
        """Wait until nothing is being drawn."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take(self, prompts: PromptBatch, *, iteration: int) -> Sampled | None:
        """Return the responses to these prompts that were drawn ahead; None if there are none.

        Args:
            prompts: of this step.
            iteration: this rollout.

        Raises:
            EngineError: they could not be drawn.
        """
        self.land()
        flight = self._flight or self._own_share(prompts)
        self._flight = self._saved = None
        if flight is None or flight.iteration != iteration or not torch.equal(flight.keys, keys_of(prompts)):
            return None
        if flight.problem is not None:
            raise flight.problem
        return flight.sampled

    def state(self) -> dict[str, Any]:
        """Return what is ahead, of all processes and for a checkpoint; empty if nothing is.

        All processes must call this. What failed is left out: a run that resumes draws it by its own weights.
        """
        self.land()
        flight = self._flight
        drawn = flight is not None and flight.sampled is not None
        if flight is None or not self.ranks.all(drawn):
            return {} if self._saved is None else self._saved
        assert flight.sampled is not None
        places = torch.arange(len(flight.keys)) * self.ranks.world + self.ranks.rank
        order = self.ranks.gather(places).argsort()
        fields = flight.sampled._asdict()
        samples = len(flight.sampled.tokens) // len(flight.keys)
        whole = {
            name: self.ranks.gather(field.unflatten(0, (-1, samples)).cpu())[order] for name, field in fields.items()
        }
        return {"iteration": flight.iteration, "keys": self.ranks.gather(flight.keys)[order], **whole}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what was ahead when a checkpoint was written, also on another number of processes."""
        self._flight = None
        self._saved = dict(state) if state else None

    def _own_share(self, prompts: PromptBatch) -> Flight | None:
        """Return this process's share of a checkpoint's responses; None if there is none."""
        saved = self._saved
        if saved is None:
            return None
        mine = slice(self.ranks.rank, None, self.ranks.world)
        device = prompts.tokens.device
        fields = {name: saved[name][mine].flatten(0, 1).to(device) for name in Sampled._fields}
        return Flight(iteration=saved["iteration"], keys=saved["keys"][mine], sampled=Sampled(**fields))


def keys_of(prompts: PromptBatch) -> Tensor:
    """Return a number of each prompt that its tokens decide, (B,), int64, on the CPU."""
    tokens = (prompts.tokens * prompts.mask + prompts.mask).cpu()
    key = torch.zeros(len(tokens), dtype=torch.int64)
    for column in tokens.T:
        key = key * 1_000_003 + column  # padding on the left leaves 0
    return key
