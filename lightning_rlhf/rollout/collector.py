"""Collector of rollouts: responses of π_old with their log-probs under π_old and π_ref and values V."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.engines.engine import Engine
from lightning_rlhf.engines.generation import SamplingParams
from lightning_rlhf.models import PolicyModel, ScalarModel
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.reference import Reference
from lightning_rlhf.rewards.reward import Reward
from lightning_rlhf.rollout.clock import Clock
from lightning_rlhf.rollout.episode_sampler import EpisodeSampler
from lightning_rlhf.rollout.episodes import Episodes
from lightning_rlhf.rollout.old_logprobs import OldLogprobs, Situation, choose
from lightning_rlhf.rollout.sampler import Sampler
from lightning_rlhf.rollout.updates import Agree, UpdateSchedule, alone
from lightning_rlhf.types import PromptBatch, Rollout

logger = logging.getLogger(__name__)

FEW = 8
"""Responses whose log-probs are compared where the trainer's are not computed anyway."""


class Collector:
    """Collector of responses that also measures their log-probs and values, without gradient but for `UpdateLogprobs`.

    It owns the frozen networks. They are no part of the module's state, so `apply` carries `.to()` and casts to them.

    Args:
        policy: π_old.
        reference: π_ref.
        value: V, or None.
        reward: whose networks move along.
        engine: draws the responses.
        ranks: prompt i of this process is prompt i·world + rank of the whole batch.
        generation: how responses are drawn.
        updates: what learns from the rollout; its microbatches are also how it is measured.
        clock: takes the seconds of each phase.
        episodes: what answers the policy, and the policy's tokenizer; None for single responses.
        agree: how many pieces every process must measure its rollout in.
        keeps_graph: whether the only update may go on from the pass that measures log π_old.
    """

    def __init__(
        self,
        policy: PolicyModel,
        reference: Reference,
        value: ScalarModel | None,
        reward: Reward,
        *,
        engine: Engine,
        ranks: Ranks,
        generation: SamplingParams,
        updates: UpdateSchedule,
        clock: Clock | None = None,
        episodes: tuple[Episodes, PreTrainedTokenizerBase | None] | None = None,
        agree: Agree = alone,
        keeps_graph: bool = True,
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.value = value
        self.reward = reward
        self.ranks = ranks
        self.generation = generation
        self.updates = updates
        self.agree = agree
        self.keeps_graph = keeps_graph
        self.clock = clock or Clock()
        place: dict[str, Any] = {"ranks": ranks, "generation": generation, "clock": self.clock}
        if episodes is None:
            self.sampler = Sampler(policy, engine, **place)
        else:
            self.sampler = EpisodeSampler(policy, engine, episodes=episodes[0], tokenizer=episodes[1], **place)
        self._named: set[OldLogprobs] = set()

    @property
    def engine(self) -> Engine:
        """Engine that draws the responses."""
        return self.sampler.engine

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the frozen networks."""
        for network in self.frozen():
            network._apply(fn)

    def to(self, device: torch.device) -> None:
        """Move the frozen networks."""
        for network in self.frozen():
            network.to(device)

    def frozen(self) -> list[nn.Module]:
        """List the frozen networks: those of the reward and the reference."""
        own = self.reference.frozen
        return self.reward.networks() + ([] if own is None else [own])

    def __deepcopy__(self, memo: dict[int, object]) -> Collector:
        """Copy the collector but share its frozen networks, because averaging callbacks copy the module."""
        clone = copy.copy(self)
        memo[id(self)] = clone
        return clone

    def collect(
        self, prompts: PromptBatch, *, samples: int, iteration: int, following: PromptBatch | None = None
    ) -> Rollout:
        """Sample a rollout to train on, B·k responses with those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            iteration: which rollout of the run; it names the random numbers.
            following: prompts of the next step, for an engine that draws ahead.
        """
        return self.measure(self.draw(prompts, samples=samples, iteration=iteration, following=following))

    def draw(
        self,
        prompts: PromptBatch,
        *,
        samples: int,
        iteration: int,
        batch: int = 0,
        following: PromptBatch | None = None,
    ) -> Rollout:
        """Sample B·k responses to train on, whose log-probs and values are not yet measured.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            iteration: which rollout of the run; it names the random numbers.
            batch: which batch of that rollout.
            following: prompts of the next step, for an engine that draws ahead.
        """
        if batch > 0:
            return self.sampler.rollout(prompts, samples, stream=f"train/{batch}", iteration=iteration)
        return self.sampler.collect(prompts, samples, iteration=iteration, following=following)

    def measure(self, rollout: Rollout) -> Rollout:
        """Add log π_old by the source of `updates`, log π_ref and V to a rollout to train on."""
        pieces = self.updates.pieces(rollout, self.agree)
        epochs = self.updates.epochs
        one_step = len(pieces) == 1 and epochs == 1 and self.keeps_graph
        source = choose(self.updates.old_logprobs, self._situation(one_step=one_step, epochs=epochs))
        self._tell(source)
        return self._measured(rollout, pieces, source)

    def respond(self, prompts: PromptBatch, *, samples: int, stream: str, iteration: int) -> Rollout:
        """Sample a rollout for evaluation, B·k responses with those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            stream: names the random numbers; those of `train` are the training's.
            iteration: which rollout of that stream.
        """
        rollout = self.sampler.rollout(prompts, samples, stream=stream, iteration=iteration)
        pieces = self.updates.split(rollout, self.agree)
        return self._measured(rollout, pieces, choose(None, self._situation(one_step=False, epochs=0)))

    def _measured(self, rollout: Rollout, pieces: list[Tensor], source: OldLogprobs) -> Rollout:
        """Add log π_ref, log π_old and V of each token to a rollout."""
        temperature = self.generation.temperature

        def logprobs(part: Rollout) -> Tensor:
            return self.policy.response_logprobs(part, temperature=temperature)

        with self.clock.phase("reference"), self.reference.model() as model:
            of_reference = in_pieces(lambda x: model.response_logprobs(x, temperature=temperature), rollout, pieces)
            rollout = replace(rollout, ref_logprobs=of_reference)
        with self.clock.phase("old_logprobs"):
            rollout = source(rollout, lambda x: in_pieces(logprobs, x, pieces), logprobs)
        if self.engine.is_external:
            self._confirm(rollout, logprobs)
        if self.value is not None:
            with self.clock.phase("values"):
                rollout = replace(rollout, values=in_pieces(self.value.response_values, rollout, pieces))
        return rollout

    @torch.no_grad()
    def _confirm(self, rollout: Rollout, measure: Callable[[Rollout], Tensor]) -> None:
        """Have the engine compare its log-probs with the trainer's; of what was drawn ahead, those of a few rows."""
        if not self.engine.overlaps:
            self.engine.confirm(rollout, rollout.logprobs, same_weights=True)
            return
        few = rollout.select(torch.arange(min(FEW, len(rollout)), device=rollout.tokens.device))
        self.engine.confirm(few, measure(few), same_weights=False)

    def _situation(self, *, one_step: bool, epochs: int) -> Situation:
        samples_in, trains_in = self._dtypes()
        same = samples_in == trains_in and not (self.engine.is_external or is_quantized(self.policy.network))
        full = same and trains_in in (torch.float32, torch.float64)
        return Situation(
            full_precision=full, one_step=one_step, epochs=epochs, ahead=epochs > 0 and self.engine.overlaps
        )

    def _dtypes(self) -> tuple[torch.dtype | str, torch.dtype]:
        """Return the dtype of the sampling weights (or the engine that has them) and that of the trained weights."""
        device = self.ranks.device.type
        samples_in = self.engine.copy_dtype(self.policy, self.generation, device)
        return samples_in or type(self.engine).__name__, self.policy.computing_dtype(device)

    def _tell(self, source: OldLogprobs) -> None:
        """Log the source of log π_old once."""
        if source not in self._named:
            self._named.add(source)
            logger.info("log π_old is %s (sampled in %s, trained in %s)", source.meaning, *self._dtypes())


@torch.no_grad()
def in_pieces(measure: Callable[[Rollout], Tensor], rollout: Rollout, pieces: list[Tensor]) -> Tensor:
    """Measure each token of a rollout piece by piece, (B, R).

    Args:
        measure: from some rows to one number per token of them.
        rollout: B responses.
        pieces: row numbers of each piece, which together are all rows.
    """
    parts = [measure(rollout.select(index)) for index in pieces]
    whole = parts[0].new_zeros(rollout.response_mask.shape)
    for index, part in zip(pieces, parts, strict=True):
        whole[index, : part.shape[1]] = part
    return whole
