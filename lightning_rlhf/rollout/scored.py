"""Scored responses of a training step, and their division into the groups of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lightning_rlhf.rewards.reward import Scores
from lightning_rlhf.rollout.ahead import keys_of
from lightning_rlhf.types import Objectives, PromptBatch, Rollout, Row

OF_RESPONSES = ("response_mask", "ended", "sampler_logprobs", "entropy", "rewards", "failed")
"""Fields of a rollout that a group keeps beside the tokens, those it has; the others are measured later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRollout:
    """Responses to prompts with their scores.

    Attributes:
        prompts: B prompts.
        rollout: k responses to each, in consecutive rows.
        scores: of these, (B·k,).
        learned: responses that count in the update, (B·k,), bool.
        metrics: how they were drawn, by logged name.
    """

    prompts: PromptBatch
    rollout: Rollout
    scores: Scores
    learned: Tensor
    metrics: dict[str, float]


class Prompt(NamedTuple):
    """A prompt that may be exchanged between processes.

    Attributes:
        place: among those drawn for a rollout, over all batches and processes.
        key: number that its tokens decide.
        tokens: (P,), int64, on the CPU.
        row: its record.
    """

    place: int
    key: int
    tokens: Tensor
    row: Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt with its k scored responses, on the CPU.

    Attributes:
        prompt: that is answered.
        tokens: of the responses, (k, R), int64.
        real: of these, (k, R), bool: the policy's and an environment's.
        responses: their `OF_RESPONSES`, (k, …) each.
        scores: of the responses, (k,).
    """

    prompt: Prompt
    tokens: Tensor
    real: Tensor
    responses: dict[str, Tensor]
    scores: Scores

    @property
    def raw(self) -> Tensor:
        """Scores before shaping, (k,), reward units."""
        return self.scores.total if self.scores.raw is None else self.scores.raw


def without_failed(rollout: Rollout, scores: Tensor) -> Tensor:
    """Replace the scores of episodes whose environment failed, so that the baselines of the others do not move.

    Such a score becomes the mean of the others of its group, or of this process's episodes where all of a group failed.

    Args:
        rollout: B responses.
        scores: of these, (B,), reward units.
    """
    if rollout.failed is None or not rollout.failed.any():
        return scores
    well = ~rollout.failed
    place = rollout.prompt_index
    groups = scores.new_zeros(2, int(place.max()) + 1)
    groups[0].index_add_(0, place[well], scores[well])
    groups[1].index_add_(0, place[well], torch.ones_like(scores[well]))
    total, count = groups
    everywhere = scores[well].mean() if well.any() else scores.new_zeros(())
    means = torch.where(count > 0, total / count.clamp(min=1), everywhere)
    return torch.where(well, scores, means[place])


def prompts_of(batch: PromptBatch, places: Sequence[int]) -> list[Prompt]:
    """List the prompts of a batch; `places` are theirs among all that are drawn for a rollout."""
    keys = keys_of(batch).tolist()
    tokens = [row[real].cpu() for row, real in zip(batch.tokens, batch.mask, strict=True)]
    return [Prompt(*parts) for parts in zip(places, keys, tokens, batch.rows, strict=True)]


def batch_of(prompts: Sequence[Prompt], *, device: torch.device) -> PromptBatch:
    """Batch prompts, padded on the left to the longest."""
    tokens = pad_sequence([prompt.tokens for prompt in prompts], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    is_real = torch.ones(len(prompts), dtype=torch.bool, device=device)
    return PromptBatch(tokens.to(device), mask.to(device), is_real, [prompt.row for prompt in prompts])


def divided(batch: PromptBatch, rollout: Rollout, scores: Scores, *, places: Sequence[int]) -> list[Group]:
    """Divide a scored rollout into the groups of its B prompts.

    Args:
        batch: B prompts.
        rollout: k responses to each, in consecutive rows.
        scores: of these.
        places: of the prompts among all that are drawn for a rollout.
    """
    samples = len(rollout) // len(batch.tokens)
    kept = {name: getattr(rollout, name) for name in OF_RESPONSES}
    present = {name: part for name, part in kept.items() if part is not None}
    first = rollout.attention_mask[::samples, : rollout.prompt_width]
    return [
        Group(
            prompt=prompt._replace(tokens=rollout.tokens[i * samples, : rollout.prompt_width][first[i]].cpu()),
            tokens=rollout.tokens[rows, rollout.prompt_width :].cpu(),
            real=rollout.attention_mask[rows, rollout.prompt_width :].cpu(),
            responses={name: part[rows].cpu() for name, part in present.items()},
            scores=_of_rows(scores, rows),
        )
        for i, prompt in enumerate(prompts_of(batch, places))
        for rows in [slice(i * samples, (i + 1) * samples)]
    ]


def joined(groups: Sequence[Group], *, device: torch.device) -> tuple[PromptBatch, Rollout, Scores]:
    """Put the groups of B prompts together, padded to the longest prompt and response; nothing is measured yet."""
    batch = batch_of([group.prompt for group in groups], device=device)
    index = torch.arange(len(groups), device=device).repeat_interleave(len(groups[0].tokens))
    width = max(int(group.real.sum(1).max()) for group in groups)
    tokens, real = (
        _stacked(part, width).to(device) for part in zip(*((g.tokens, g.real) for g in groups), strict=True)
    )
    names = groups[0].responses
    parts = {name: _stacked([group.responses[name] for group in groups], width).to(device) for name in names}
    unknown = torch.zeros_like(parts["sampler_logprobs"])
    rollout = Rollout(
        tokens=torch.cat([batch.tokens[index], tokens], 1),
        attention_mask=torch.cat([batch.mask[index], real], 1),
        prompt_index=index,
        logprobs=unknown,
        ref_logprobs=unknown,
        values=unknown,
        **parts,
    )
    return batch, rollout, _all_of([group.scores for group in groups], device)


def _stacked(parts: Sequence[Tensor], width: int) -> Tensor:
    """Stack numbers of tokens, cut or padded with 0 to `width`; numbers of responses as they are."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    return torch.cat([pad(part[:, :width], (0, max(width - part.shape[1], 0))) for part in parts])


def _of_rows(scores: Scores, rows: slice) -> Scores:
    """Select rows of scores, on the CPU."""
    objectives = scores.objectives
    return Scores(
        scores.total[rows].cpu(),
        {name: part[rows].cpu() for name, part in scores.parts.items()},
        None if scores.raw is None else scores.raw[rows].cpu(),
        objectives=None if objectives is None else Objectives(objectives.scores[rows].cpu(), objectives.weights.cpu()),
    )


def _all_of(scores: list[Scores], device: torch.device) -> Scores:
    """Put the scores of several groups together."""
    raw = [one.raw for one in scores if one.raw is not None]
    objectives = [one.objectives for one in scores if one.objectives is not None]
    joint = None
    if objectives:
        rows = torch.cat([one.scores for one in objectives])
        joint = Objectives(rows.to(device), objectives[0].weights.to(device))
    return Scores(
        torch.cat([one.total for one in scores]).to(device),
        {name: torch.cat([one.parts[name] for one in scores]).to(device) for name in scores[0].parts},
        torch.cat(raw).to(device) if raw else None,
        objectives=joint,
    )
