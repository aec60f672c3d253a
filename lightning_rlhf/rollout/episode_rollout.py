"""Rollout of episodes that are over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.rollout.episode import Episode
from lightning_rlhf.types import PromptBatch, Rollout


def rollout_of(played: Sequence[Episode], prompts: PromptBatch, *, pad: int, dtype: torch.dtype) -> Rollout:
    """Combine episodes into a rollout, whose unmeasured fields are zero.

    The prompt of a response is what the openings of all episodes of its prompt begin with; the rest of an opening,
    where they differ, is part of the response that the environment wrote.

    Args:
        played: k episodes of each of B prompts, in consecutive rows.
        prompts: of these.
        pad: id where there is no token.
        dtype: of the numbers.
    """
    device = prompts.tokens.device
    samples = len(played) // len(prompts.tokens)
    for episode in played:
        episode.check()
    groups = [played[i : i + samples] for i in range(0, len(played), samples)]
    own = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens, prompts.mask, strict=True)]
    starts = [
        start for pair in zip(groups, own, strict=True) for start in [_shared_opening(*pair)] for _ in range(samples)
    ]
    before = max(starts)
    after = max(len(episode.context) - start for episode, start in zip(played, starts, strict=True))
    size = len(played), before + max(after, 1)
    tokens, real = torch.full(size, pad), torch.zeros(size, dtype=torch.bool)
    chosen = torch.zeros(size[0], size[1] - before, dtype=torch.bool)
    logprobs, entropy, rewards = (torch.zeros(chosen.shape, dtype=torch.float64) for _ in range(3))
    for i, (episode, start) in enumerate(zip(played, starts, strict=True)):
        first = before - start
        tokens[i, first : first + len(episode.context)] = torch.tensor(episode.context, dtype=torch.long)
        real[i, first : first + len(episode.context)] = True
        part = slice(episode.opening - start, len(episode.context) - start)
        chosen[i, part] = torch.tensor(episode.chosen, dtype=torch.bool)
        for table, numbers in ((logprobs, episode.logprobs), (entropy, episode.entropy), (rewards, episode.rewards)):
            table[i, part] = torch.tensor(numbers, dtype=torch.float64)
    unknown = torch.zeros(chosen.shape, device=device, dtype=dtype)
    return Rollout(
        tokens=tokens.to(device),
        attention_mask=real.to(device),
        response_mask=chosen.to(device),
        ended=_each(played, "done", device),
        prompt_index=torch.arange(len(prompts.tokens), device=device).repeat_interleave(samples),
        sampler_logprobs=logprobs.to(device, dtype),
        entropy=entropy.to(device, dtype),
        logprobs=unknown,
        ref_logprobs=unknown,
        values=unknown,
        rewards=rewards.to(device, dtype),
        failed=_each(played, "failed", device),
    )


def _shared_opening(group: Sequence[Episode], prompt: list[int]) -> int:
    """Return how many ids all openings of a prompt begin with, its prompt in the rollout.

    An episode that failed before its first turn has no opening: it takes this one.

    Args:
        group: episodes of one prompt.
        prompt: its ids, the opening where none of the episodes has another.
    """
    begun = [episode for episode in group if episode.drawn]
    opening = begun[0].context[: _common(begun)] if begun else prompt
    for episode in group:
        if not episode.drawn:
            episode.open(opening)
    return len(opening)


def _common(group: Sequence[Episode]) -> int:
    """Number of ids that all openings of a prompt begin with."""
    openings = [episode.context[: episode.opening] for episode in group]
    shortest = min(map(len, openings))
    return next((i for i in range(shortest) if len({ids[i] for ids in openings}) > 1), shortest)


def _each(played: Sequence[Episode], state: str, device: torch.device) -> Tensor:
    return torch.tensor([episode.state == state for episode in played], device=device)
