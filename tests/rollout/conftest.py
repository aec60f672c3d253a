"""Rollouts of known tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lightning_rlhf.types import Rollout


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """A rollout of given prompts and responses; an end token (0) at the end of a response means that it ended."""

    def make(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, fill: int = 0) -> Rollout:
        before, after = max(map(len, prompts)), max(map(len, responses))
        tokens, attention = [], []
        for p, r in zip(prompts, responses, strict=True):
            tokens.append([fill] * (before - len(p)) + list(p) + list(r) + [fill] * (after - len(r)))
            attention.append([False] * (before - len(p)) + [True] * (len(p) + len(r)) + [False] * (after - len(r)))
        response = torch.tensor(attention)[:, before:]
        numbers = torch.zeros(response.shape)
        return Rollout(
            tokens=torch.tensor(tokens),
            attention_mask=torch.tensor(attention),
            response_mask=response,
            ended=torch.tensor([r[-1] == 0 for r in responses]),
            prompt_index=torch.arange(len(responses)),
            logprobs=numbers,
            sampler_logprobs=numbers,
            ref_logprobs=numbers,
            entropy=numbers,
            values=numbers,
        )

    return make
