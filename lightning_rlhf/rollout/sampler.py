"""Sampler of responses by an engine that has today's weights, with at most one rollout drawn ahead."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_rlhf.distributed.ranks import Ranks
from lightning_rlhf.engines.engine import Engine, Request, check_sampled
from lightning_rlhf.engines.generation import SamplingParams, row_uniforms
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.models import PolicyModel
from lightning_rlhf.rollout.ahead import Ahead
from lightning_rlhf.rollout.clock import Clock
from lightning_rlhf.types import PromptBatch, Rollout


class Sampler:
    """Sampler of responses: what an engine is asked, with which weights and random numbers.

    Weights are handed to the engine before the first draw after `outdate`, by all processes together.

    Args:
        policy: π_old.
        engine: draws the responses.
        ranks: prompt i of this process is prompt i·world + rank of the whole batch.
        generation: how responses are drawn.
        clock: takes the seconds of each phase.
    """

    def __init__(
        self, policy: PolicyModel, engine: Engine, *, ranks: Ranks, generation: SamplingParams, clock: Clock
    ) -> None:
        self.policy = policy
        self.engine = engine
        self.ranks = ranks
        self.generation = generation
        self.clock = clock
        self.version = 0
        self.ahead = Ahead(ranks)
        engine.attach(ranks)
        self._outdated = True

    @property
    def longest(self) -> int:
        """Most tokens after a prompt."""
        return self.generation.max_new_tokens

    def status(self, done: int, total: int) -> str:
        """Describe how far a rollout is, for a progress bar.

        Args:
            done: responses that the engine has drawn of those it was asked for last.
            total: those.
        """
        return f"{done}/{total} responses"

    def outdate(self, version: int | None = None) -> None:
        """Note that the policy's weights have changed, or may have.

        Args:
            version: rollouts that today's weights have learned from; None if they have learned from no other.
        """
        self.version = self.version if version is None else version
        self._outdated = True

    @torch.no_grad()
    def collect(
        self, prompts: PromptBatch, samples: int, *, iteration: int, following: PromptBatch | None = None
    ) -> Rollout:
        """Return the responses of a training step, and begin with those of the next if the engine draws ahead.

        Those of rollout n + 1 are drawn by the weights of rollout n, before its update.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            iteration: which rollout.
            following: prompts of the next step; None if there is none.

        Raises:
            EngineError: the engine failed, or what it returned is not whole.
        """
        self.outdate(iteration)
        with self.clock.phase("generate"):
            sampled = self._together(lambda: self.ahead.take(prompts, iteration=iteration))
        if not self._everywhere(sampled is not None) or sampled is None:
            sampled = self.draw(prompts, samples, stream="train", iteration=iteration)
        if following is not None and self.engine.overlaps:
            request = self._request(following, samples, stream="train", iteration=iteration + 1)
            self._load()
            version = self.version
            self.ahead.start(lambda: self._drawn(request, version), following, iteration=iteration + 1)
        return sampled.rollout(prompts)

    def rollout(self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> Rollout:
        """Return a rollout of `draw`, whose log-probs and values are not yet measured."""
        return self.draw(prompts, samples, stream=stream, iteration=iteration).rollout(prompts)

    @torch.no_grad()
    def draw(self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> Sampled:
        """Draw B·k responses with today's weights, those of one prompt in consecutive rows.

        Args:
            prompts: B prompts of this process.
            samples: k, responses to each prompt.
            stream: names the random numbers.
            iteration: which rollout of that stream.

        Raises:
            EngineError: the engine failed, or what it returned is not whole.
        """
        request = self._request(prompts, samples, stream=stream, iteration=iteration)
        self._load()
        with self.clock.phase("generate"):
            sampled = self._together(lambda: self._drawn(request, self.version))
        assert sampled is not None
        return sampled

    def _drawn(self, request: Request, version: int) -> Sampled:
        sampled = self.engine.generate(request)
        check_sampled(sampled, request, version)
        return sampled

    def _everywhere(self, there: bool) -> bool:
        """Return True if every process has drawn ahead, because they load weights together."""
        return self.ranks.all(there) if self.engine.overlaps else there

    def _together(self, draw: Callable[[], Sampled | None]) -> Sampled | None:
        """Draw, and raise on every process if an engine outside fails on one."""
        if not self.engine.is_external:
            return draw()
        sampled = problem = None
        try:
            sampled = draw()
        except Exception as error:  # any: the other processes wait
            problem = error
        self.ranks.agree(problem)
        return sampled

    def _load(self) -> None:
        """Hand today's weights to the engine unless it has them, once it has drawn by those before."""
        if not self._outdated:
            return
        self.ahead.land()
        if self.engine.is_external:
            with self.clock.phase("sync"):
                self.engine.load(self.policy, self.version)
        else:
            self.engine.load(self.policy, self.version)
        self._outdated = False

    def _request(self, prompts: PromptBatch, samples: int, *, stream: str, iteration: int) -> Request:
        rank, world = self.ranks.rank, self.ranks.world
        rows = [(prompt * world + rank) * samples + i for prompt in range(len(prompts.tokens)) for i in range(samples)]
        uniforms = row_uniforms(
            seed=self.generation.seed or 0,
            stream=stream,
            iteration=iteration,
            rows=rows,
            length=self.generation.max_new_tokens,
        )
        return Request(
            prompts=prompts,
            samples=samples,
            uniforms=uniforms,
            params=self.generation,
            end_tokens=self.policy.end_tokens,
        )
