"""Sampling with Hugging Face's `generate` for networks whose cache the decode loop does not support."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lightning_rlhf.engines.draw import draw
from lightning_rlhf.engines.progress import Watch
from lightning_rlhf.engines.response_buffer import Record, Sampled


@torch.no_grad()
def generate(
    network: nn.Module,
    tokens: Tensor,
    mask: Tensor,
    uniforms: Tensor | None,
    *,
    samples: int = 1,
    length: int,
    temperature: float,
    end_tokens: list[int],
    pad_token: int,
    watch: Watch | None = None,
) -> Sampled:
    """Sample responses with `generate`: the same tokens as `decode` from the same random numbers.

    Args:
        network: a causal language model with a `generate` method.
        tokens: prompts, (B, P), int64, padded on the left.
        mask: real prompt tokens, (B, P), bool.
        uniforms: (B·samples, length), float64; None decodes greedily.
        samples: responses to each prompt, in consecutive rows.
        length: R, the most tokens of a response.
        temperature: τ.
        end_tokens: ids that end a response.
        pad_token: id written after the end.
        watch: follows the drawing; None for nobody.
    """
    tokens, mask = tokens.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    device = tokens.device
    record = Record(len(tokens), length=length, pad_token=pad_token, end_tokens=end_tokens, device=device, watch=watch)
    chooser = _Chooser(record, uniforms, prompt_width=tokens.shape[1], temperature=temperature)
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=list(end_tokens), pad_token_id=pad_token
    )
    plain: Any = copy.copy(network)  # with no defaults of its own, such as a repetition penalty
    plain.generation_config = config
    plain.generate(tokens, attention_mask=mask.long(), logits_processor=LogitsProcessorList([chooser]))
    return record.sampled()


class _Chooser(LogitsProcessor):
    """Logits processor that draws each token itself and forces `generate` to take it."""

    def __init__(self, record: Record, uniforms: Tensor | None, *, prompt_width: int, temperature: float) -> None:
        self.record = record
        self.uniforms = uniforms
        self.prompt_width = prompt_width
        self.temperature = temperature
        self.open: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores of −∞ except for the drawn tokens."""
        place = input_ids.shape[1] - self.prompt_width
        self.open = torch.ones_like(input_ids[:, 0], dtype=torch.bool) if self.open is None else self.open
        rows = self.open.nonzero().squeeze(1)
        numbers = None if self.uniforms is None else self.uniforms.to(rows.device)[rows, place]
        drawn = draw(scores[rows], numbers, temperature=self.temperature)
        goes_on = self.record.add(rows, torch.full_like(rows, place), drawn)
        self.open = self.open.masked_scatter(self.open, goes_on)
        forced = torch.full_like(scores, -torch.inf)
        forced[rows, drawn.token] = 0.0
        return forced
