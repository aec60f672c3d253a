"""Selection of what a training step learns from: every prompt, or those whose responses teach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_rlhf.core import Algorithm, Curriculum
from lightning_rlhf.rewards import Scores
from lightning_rlhf.rollout.pass_rates import PassRates
from lightning_rlhf.rollout.responder import Responder
from lightning_rlhf.rollout.scored import Group, Prompt, ScoredRollout, batch_of, divided, joined, prompts_of
from lightning_rlhf.types import PromptBatch, Rollout

Further = Callable[[int], PromptBatch]
"""Map of a number, 0, 1, …, to this process's share of a further batch of training prompts."""
Score = Callable[[Rollout, PromptBatch], Scores]
MOST_LOOKED_THROUGH = 16
"""Batches that are looked through for prompts that do not rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Request of a training step.

    Attributes:
        prompts: B prompts of this process.
        samples: k, responses to each.
        iteration: which rollout.
        following: prompts of the next step, for an engine that draws ahead.
    """

    prompts: PromptBatch
    samples: int
    iteration: int
    following: PromptBatch | None = None


class Selection:
    """Selection of the prompts and responses of training steps.

    Further batches are counted, and the count is saved: a run that is killed while it draws them repeats the step.

    Args:
        algorithm: whose dynamic sampling draws until enough groups teach; without it every group is learned from.
        curriculum: lets prompts rest; None draws every prompt.
        further: source of further batches.
    """

    def __init__(self, algorithm: Algorithm, curriculum: Curriculum | None, further: Further) -> None:
        self.algorithm, self.dynamic = algorithm, algorithm.dynamic_sampling
        self.rates = PassRates(curriculum)
        self.further = further
        self._taken = 0

    @property
    def selects(self) -> bool:
        """True if not every prompt is drawn, or not every group learned from."""
        return self.dynamic is not None or self.rates.curriculum is not None

    @property
    def needs_further(self) -> bool:
        """True if prompts may be replaced by further ones."""
        return self.rates.curriculum is not None or (self.dynamic is not None and self.dynamic.batches > 1)

    def collect(self, responder: Responder, step: Step, score: Score) -> ScoredRollout:
        """Sample and score k responses to each of as many prompts as came, and measure what is learned from.

        Args:
            responder: draws and measures.
            step: what is asked for.
            score: from responses and their prompts to their scores.
        """
        if not self.selects:
            return _everything(responder, step, score)
        ranks, device = responder.ranks, step.prompts.tokens.device
        size = len(step.prompts.tokens) * ranks.world
        drawn = self._drawn(responder, step, size, score)
        teaching = [group for group in drawn if self._teaches(group)]
        flat = [group for group in drawn if not self._teaches(group)]
        chosen = [*teaching, *flat][:size]
        mine = sorted(chosen, key=lambda group: group.prompt.place)[ranks.rank :: ranks.world]
        prompts, rollout, scores = joined(mine, device=device)
        keep_flat = self.dynamic is not None and self.dynamic.keep_flat
        learned = torch.tensor([keep_flat or self._teaches(group) for group in mine], device=device)
        stats = _metrics(drawn, share=len(teaching) / len(drawn), learned=min(len(teaching), size), size=size)
        if self.rates.curriculum is not None:
            stats["filter/resting"] = float(self.rates.resting(step.iteration + 1))
        return ScoredRollout(
            prompts=prompts,
            rollout=responder.measure(rollout),
            scores=scores,
            learned=learned[rollout.prompt_index] & _sound(rollout),
            metrics=stats,
        )

    def state(self) -> dict[str, Any]:
        """Return the number of further batches taken and the pass rates, for a checkpoint."""
        return {"taken": self._taken, "rates": self.rates.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; an empty one is that of a start."""
        self._taken = state.get("taken", 0)
        self.rates.restore(state.get("rates", {}))

    def _drawn(self, responder: Responder, step: Step, size: int, score: Score) -> list[Group]:
        """Draw batches until `size` groups teach, and return the groups of all processes by place."""
        most = 1 if self.dynamic is None else self.dynamic.batches
        drawn: list[Group] = []
        while len(drawn) < most * size and sum(map(self._teaches, drawn)) < size:
            batch = step.prompts
            if drawn or self.rates.curriculum is not None:
                batch = self._fresh(responder, step, drawn, size)
            drawn += _draw(responder, replace(step, prompts=batch), score, first=len(drawn))
        for group in drawn:
            self.rates.note(group.prompt.key, group.raw, step.iteration)
        return drawn

    def _next(self, responder: Responder) -> PromptBatch:
        """Take one more batch from the source of further ones."""
        batch = self.further(self._taken)
        self._taken += 1
        moved: PromptBatch = move_data_to_device(batch, responder.ranks.device)
        return moved

    def _fresh(self, responder: Responder, step: Step, drawn: list[Group], size: int) -> PromptBatch:
        """Return as many prompts as came without those that rest or were drawn for this rollout.

        The step's own prompts come first if none was drawn yet. Where there are too few, others are drawn again.
        """
        seen = {group.prompt.key for group in drawn}
        fresh: list[Prompt] = []
        stale: list[Prompt] = []
        for number in range(MOST_LOOKED_THROUGH):
            batch = self._next(responder) if drawn or number > 0 else step.prompts
            mine = prompts_of(batch, _places(responder, batch, first=0))
            for prompt in sorted(responder.ranks.gather_objects(mine), key=lambda prompt: prompt.place):
                usable = prompt.key not in seen and self.rates.awake(prompt.key, step.iteration)
                (fresh if usable else stale).append(prompt)
                seen.add(prompt.key)
            if len(fresh) >= size:
                break
        chosen = [*fresh, *stale][:size]
        return batch_of(chosen[responder.ranks.rank :: responder.ranks.world], device=step.prompts.tokens.device)

    def _teaches(self, group: Group) -> bool:
        """Return True if a group is learned from."""
        return self.dynamic is None or self.algorithm.teaches(group.raw, group.scores.objectives)


def _everything(responder: Responder, step: Step, score: Score) -> ScoredRollout:
    """Return scored and measured responses to the prompts as they came, all to be learned from."""
    rollout = responder.collect(step.prompts, samples=step.samples, iteration=step.iteration, following=step.following)
    return ScoredRollout(
        prompts=step.prompts,
        rollout=rollout,
        scores=score(rollout, step.prompts),
        learned=_sound(rollout),
        metrics={},
    )


def _sound(rollout: Rollout) -> Tensor:
    """Responses that may be learned from, (B,), bool: all but those whose environment failed."""
    everything = torch.ones(len(rollout), dtype=torch.bool, device=rollout.tokens.device)
    return everything if rollout.failed is None else ~rollout.failed


def _draw(responder: Responder, step: Step, score: Score, *, first: int) -> list[Group]:
    """Draw and score a batch, and return the groups of all processes by place.

    Args:
        responder: draws.
        step: whose prompts are answered.
        score: from responses and their prompts to their scores.
        first: groups of all processes drawn before.
    """
    size = len(step.prompts.tokens) * responder.ranks.world
    rollout = responder.draw(step.prompts, samples=step.samples, iteration=step.iteration, batch=first // size)
    unknown = torch.full_like(rollout.logprobs, torch.nan)  # a reward that reads what is not measured must not get 0
    blind = replace(rollout, logprobs=unknown, ref_logprobs=unknown, values=unknown)
    scores = score(blind, step.prompts)
    groups = divided(step.prompts, rollout, scores, places=_places(responder, step.prompts, first=first))
    return sorted(responder.ranks.gather_objects(groups), key=lambda group: group.prompt.place)


def _places(responder: Responder, batch: PromptBatch, *, first: int) -> Sequence[int]:
    """Places of this process's prompts among those of all, after the first ones."""
    ranks = responder.ranks
    return range(first + ranks.rank, first + len(batch.tokens) * ranks.world, ranks.world)


def _metrics(drawn: list[Group], *, share: float, learned: int, size: int) -> dict[str, float]:
    """Return how the responses of all processes were drawn, by logged name.

    Args:
        drawn: groups of all batches.
        share: of them that teach.
        learned: of them that are learned from.
        size: groups to a batch.
    """
    tokens = sum(int(group.responses["response_mask"].sum()) for group in drawn)
    return {
        "filter/pass_rate": share,
        "filter/batches": len(drawn) / size,
        "filter/tokens": float(tokens),
        "filter/tokens_per_response": tokens / max(learned * len(drawn[0].raw), 1),
        "filter/raw_scores": float(torch.cat([group.raw for group in drawn]).double().mean()),
    }
