"""Responses of the reference, drawn as the policy's with a random stream of their own."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_rlhf.engines.generation import row_uniforms
from lightning_rlhf.engines.sampler import Sampler
from lightning_rlhf.models.context_length import check_length
from lightning_rlhf.rollout.collector import Collector
from lightning_rlhf.types import PromptBatch, Rollout

STREAM = "reference"
"""Random stream of the reference; each response to a prompt has a stream of its own below it."""


@torch.no_grad()
def reference_rollout(collector: Collector, prompts: PromptBatch, *, samples: int, iteration: int) -> Rollout:
    """Sample B·k responses of π_ref with the sampler's log-probs, those of one prompt in consecutive rows.

    Response j to a prompt is the same however many are asked for and whatever the number of processes. Of a sharded
    reference all processes must call this together.

    Args:
        collector: whose reference, at its temperature and length.
        prompts: B prompts of this process.
        samples: k, responses to each prompt, ≥ 1.
        iteration: which batch of prompts.
    """
    generation, ranks = collector.generation, collector.ranks
    rows = range(ranks.rank, len(prompts.tokens) * ranks.world, ranks.world)
    place = {"seed": generation.seed, "iteration": iteration, "rows": rows, "length": generation.max_new_tokens}
    uniforms = torch.stack([row_uniforms(stream=f"{STREAM}/{j}", **place) for j in range(samples)], 1).flatten(0, 1)
    room = replace(generation, slots=None if generation.slots is None else max(generation.slots, samples))
    with collector.reference.model() as model:
        longest = prompts.tokens.shape[1] + generation.max_new_tokens
        check_length(model.network, longest, limits="the data's `max_prompt_tokens` or `max_new_tokens`")
        return Sampler(model, room)(prompts, uniforms, samples=samples).rollout(prompts)
