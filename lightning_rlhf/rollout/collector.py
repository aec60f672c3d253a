"""Prompts in, rollout out: responses of π_old with what π_old, π_ref and V say of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.rollout.clock import Clock
from lightning_rlhf.rollout.generation import Generation, row_uniforms
from lightning_rlhf.rollout.old import OldLogprobs, Situation, choose
from lightning_rlhf.rollout.reward import Reward
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.updates import Agree, Updates, alone
from lightning_rlhf.types import PromptBatch, Rollout

logger = logging.getLogger(__name__)


class Collector:
    """Samples and measures; only `FromUpdate` leaves a gradient in it.

    It owns the frozen networks. They are no part of the module's state, so `apply` carries `.to()` and casts to them.

    Args:
        policy: π_old.
        reference: π_ref; None is the policy with its adapter off.
        value: V, or None.
        reward: whose networks move along.
        generation: how responses are drawn.
        updates: what learns from the rollout; its microbatches are also how it is measured.
        old_logprobs: where log π_old comes from; None chooses.
        clock: takes the seconds of each phase.
        agree: how many pieces every process must measure its rollout in.
    """

    def __init__(
        self,
        policy: PolicyModel,
        reference: PolicyModel | None,
        value: ScalarModel | None,
        reward: Reward,
        *,
        generation: Generation,
        updates: Updates,
        old_logprobs: OldLogprobs | None = None,
        clock: Clock | None = None,
        agree: Agree = alone,
    ) -> None:
        self.policy, self.reference, self.value, self.reward = policy, reference, value, reward
        self.generation, self.updates, self.old_logprobs, self.agree = generation, updates, old_logprobs, agree
        self.sampler, self.clock = Sampler(policy, generation), clock or Clock()
        self._named: set[OldLogprobs] = set()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the frozen networks."""
        for network in self.frozen():
            network._apply(fn)

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in self.frozen():
            network.to(device)

    def frozen(self) -> list[nn.Module]:
        """The reward's networks and the reference."""
        return self.reward.networks() + ([] if self.reference is None else [self.reference])

    def __deepcopy__(self, memo: dict[int, object]) -> Collector:
        """A copy that shares the frozen networks: averaging callbacks copy the module that holds this."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        return clone

    def __call__(
        self, prompts: PromptBatch, *, samples: int = 1, stream: str, iteration: int, rank: int, world: int
    ) -> Rollout:
        """A rollout of B·k responses, those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            stream: which random numbers, by name; those of `train` are learned from.
            iteration: which rollout of that stream.
            rank: this process; its prompt i is prompt i·world + rank of the whole batch.
            world: how many processes.
        """
        with self.clock.phase("generate"):
            rollout = self._sampled(prompts, samples, stream=stream, iteration=iteration, rank=rank, world=world)
        learning = stream == "train"
        cut = self.updates.pieces if learning else self.updates.split
        pieces = cut(rollout, self.agree)
        with self.clock.phase("reference"):
            rollout = replace(rollout, ref_logprobs=self._in_pieces(self._reference, rollout, pieces))
        with self.clock.phase("old_logprobs"):
            old = self._old(rollout, learning=learning, one_piece=len(pieces) == 1)
            rollout = old(rollout, lambda x: self._in_pieces(self.logprobs, x, pieces), self.logprobs)
        if self.value is not None:
            with self.clock.phase("values"):
                rollout = replace(rollout, values=self._in_pieces(self.values, rollout, pieces))
        return rollout

    @torch.no_grad()
    def _sampled(
        self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int, rank: int, world: int
    ) -> Rollout:
        rows = [(prompt * world + rank) * samples + i for prompt in range(len(prompts.tokens)) for i in range(samples)]
        length, seed = self.generation.max_new_tokens, self.generation.seed
        uniforms = row_uniforms(seed=seed, stream=stream, iteration=iteration, rows=rows, length=length)
        return self.sampler(prompts, uniforms, samples=samples).rollout(prompts)

    def logprobs(self, rollout: Rollout) -> Tensor:
        """log π_θ of each response token, (B, R), nats, 0 outside the responses."""
        return self._of(self.policy, rollout)

    def values(self, rollout: Rollout) -> Tensor:
        """V of the state before each response token, (B, R)."""
        return self.value(rollout.tokens, rollout.attention)[:, rollout.prompt_width - 1 : -1]

    def _reference(self, rollout: Rollout) -> Tensor:
        with self.policy.reference() if self.reference is None else nullcontext():
            return self._of(self.policy if self.reference is None else self.reference, rollout)

    def _of(self, model: PolicyModel, rollout: Rollout) -> Tensor:
        width, temperature = rollout.response.shape[1], self.generation.temperature
        return model(rollout.tokens, rollout.attention, width=width, temperature=temperature, groups=rollout.groups)

    @torch.no_grad()
    def _in_pieces(self, measure: Callable[[Rollout], Tensor], rollout: Rollout, pieces: list[Tensor]) -> Tensor:
        """What is measured of the pieces, (B, R)."""
        found: Tensor | None = None
        for index in pieces:
            part = measure(rollout.select(index))
            found = part.new_zeros(rollout.response.shape) if found is None else found
            found[index, : part.shape[1]] = part
        return found

    def _old(self, rollout: Rollout, *, learning: bool, one_piece: bool) -> OldLogprobs:
        """Where log π_old comes from; said once."""
        device, updates = rollout.tokens.device.type, self.updates
        samples_in, trains_in = self.sampler.dtype(device), self.sampler.training_dtype(device)
        situation = Situation(
            full_precision=samples_in == trains_in and trains_in in (torch.float32, torch.float64),
            one_step=learning and one_piece and updates.epochs == 1,
            epochs=updates.epochs if learning else 0,
        )
        chosen = choose(self.old_logprobs, situation)
        if learning and chosen not in self._named:
            self._named.add(chosen)
            logger.info("log π_old is %s (sampled in %s, trained in %s)", chosen.meaning, samples_in, trains_in)
        return chosen
