"""Prompts in, rollout out: responses of π_old with what π_old, π_ref and V say of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from lightning_rlhf.models import PolicyModel, ScalarModel, TokenStats
from lightning_rlhf.rollout.generation import Generation, row_uniforms
from lightning_rlhf.rollout.reward import Reward
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.types import PromptBatch, Rollout


class Collector:
    """Samples and measures; nothing in it has a gradient.

    It owns the frozen networks. They are no part of the module's state, so `apply` carries `.to()` and casts to them.

    Args:
        policy: π_old.
        reference: π_ref; None is the policy with its adapter off.
        value: V, or None.
        reward: whose networks move along.
        generation: how responses are drawn.
        microbatch: sequences per forward pass; None takes all at once.
    """

    def __init__(
        self,
        policy: PolicyModel,
        reference: PolicyModel | None,
        value: ScalarModel | None,
        reward: Reward,
        *,
        generation: Generation,
        microbatch: int | None,
    ) -> None:
        self.policy, self.reference, self.value, self.reward = policy, reference, value, reward
        self.generation, self.microbatch = generation, microbatch
        self.sampler = Sampler(policy, generation)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the frozen networks."""
        for network in self._frozen():
            network._apply(fn)

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in self._frozen():
            network.to(device)

    def _frozen(self) -> list[nn.Module]:
        return self.reward.networks() + ([] if self.reference is None else [self.reference])

    def __deepcopy__(self, memo: dict[int, object]) -> Collector:
        """A copy that shares the frozen networks: averaging callbacks copy the module that holds this."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        return clone

    @torch.no_grad()
    def __call__(
        self, prompts: PromptBatch, *, samples: int = 1, stream: str, iteration: int, rank: int, world: int
    ) -> Rollout:
        """A rollout of B·k responses, those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            stream: which random numbers, by name.
            iteration: which rollout of that stream.
            rank: this process; its prompt i is prompt i·world + rank of the whole batch.
            world: how many processes.
        """
        groups = torch.arange(len(prompts.tokens)).repeat_interleave(samples)
        rows = [(prompt * world + rank) * samples + i % samples for i, prompt in enumerate(groups.tolist())]
        length, seed = self.generation.max_new_tokens, self.generation.seed
        uniforms = row_uniforms(seed=seed, stream=stream, iteration=iteration, rows=rows, length=length)
        sampled = self.sampler(prompts, uniforms, samples=samples)
        width = int(sampled.response.sum(1).max())
        response = sampled.response[:, :width]
        groups = groups.to(response.device)
        tokens = torch.cat([prompts.tokens[groups], sampled.tokens[:, :width]], 1)
        attention = torch.cat([prompts.mask[groups], response], 1)
        old = self._in_pieces(self._old, tokens, attention, response)
        return Rollout(
            tokens=tokens,
            attention=attention,
            response=response,
            ended=sampled.ended,
            groups=groups,
            sampler_logprobs=sampled.logprobs[:, :width],
            logprobs=torch.where(response, old.logprobs, 0.0),
            entropy=torch.where(response, old.entropy, 0.0),
            ref_logprobs=torch.where(response, self._in_pieces(self._ref, tokens, attention, response), 0.0),
            values=self._in_pieces(self.values, tokens, attention, response),
        )

    def values(self, tokens: Tensor, attention: Tensor, response: Tensor) -> Tensor:
        """V of the state before each response token, (b, R); zeros without a value network."""
        if self.value is None:
            return torch.zeros(response.shape, device=response.device)
        return self.value(tokens, attention)[:, -response.shape[1] - 1 : -1]

    def _old(self, tokens: Tensor, attention: Tensor, response: Tensor) -> TokenStats:
        """What the policy says, computed as the update will compute it, so that the first ratio is 1."""
        width, temperature = response.shape[1], self.generation.temperature
        return self.policy(tokens, attention, width=width, temperature=temperature, with_entropy=True)

    def _ref(self, tokens: Tensor, attention: Tensor, response: Tensor) -> Tensor:
        width, temperature = response.shape[1], self.generation.temperature
        with self.policy.reference() if self.reference is None else nullcontext():
            model = self.policy if self.reference is None else self.reference
            return model(tokens, attention, width=width, temperature=temperature).logprobs

    def _in_pieces(self, measure: Callable, *tensors: Tensor) -> TokenStats | Tensor:
        pieces = [measure(*part) for part in zip(*(t.split(self.microbatch or len(t)) for t in tensors), strict=True)]
        if isinstance(pieces[0], Tensor):
            return torch.cat(pieces)
        return TokenStats(*(torch.cat(fields) for fields in zip(*pieces, strict=True)))
