"""Decode loop: prompts are read in one pass, then every open response gets a token per pass.

A response that ends leaves its slot and a waiting prompt takes it, so that the passes follow the total length of all
responses over the slots, and not the longest response of each batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_rlhf.engines.draw import draw
from lightning_rlhf.engines.progress import Watch
from lightning_rlhf.engines.response_buffer import Record, Sampled
from lightning_rlhf.engines.slots import Slots

CROWDED = 0.75
"""Share of open rows below which ended rows are dropped: dropping copies the cache of the others."""
SPARSE = 0.5
"""The same share if a pass is recorded, which must then be recorded again."""


@torch.no_grad()
def decode(
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
    slots: int | None = None,
    watch: Watch | None = None,
) -> Sampled:
    """Sample responses to all prompts, `slots` of them at a time.

    Args:
        network: a causal language model whose cache can be cut (`why_no_cache`).
        tokens: prompts, (B, P), int64, padded on the left.
        mask: real prompt tokens, (B, P), bool.
        uniforms: (B·samples, length), float64; None decodes greedily.
        samples: responses to each prompt, in consecutive rows; a prompt is read once for all of them.
        length: R, the most tokens of a response.
        temperature: τ.
        end_tokens: ids that end a response.
        pad_token: id written after the end.
        slots: rows decoded at the same time; None decodes all.
        watch: follows the drawing; None for nobody.

    Raises:
        ValueError: `slots` does not hold the responses to one prompt, or a logit is NaN or infinite.
    """
    if slots is not None and slots < samples:
        raise ValueError(
            f"`slots` must hold the responses to a prompt: got slots={slots} for {samples} samples of each"
        )
    prompts, device = len(tokens), tokens.device
    record = Record(
        prompts * samples, length=length, pad_token=pad_token, end_tokens=end_tokens, device=device, watch=watch
    )
    uniforms = None if uniforms is None else uniforms.to(device)
    room = slots or prompts * samples
    live = Slots(network)
    read = 0
    passes = length
    while True:
        if new := min((room - len(live)) // samples, prompts - read):
            rows = torch.arange(read * samples, (read + new) * samples, device=device)
            live.admit(rows, tokens[read : read + new], mask[read : read + new], samples=samples)
            read, passes = read + new, length
        choice = _draw(live, record, uniforms, temperature)
        still = int(live.open.sum())
        if not still and read == prompts:
            return record.sampled()
        if still <= (CROWDED if live.recorded is None else SPARSE) * len(live):
            choice = choice[live.open]
            live.drop_closed()
        passes -= 1
        if still:
            live.advance(choice, passes=passes if read == prompts else 0)


def _draw(live: Slots, record: Record, uniforms: Tensor | None, temperature: float) -> Tensor:
    """Draw a token for every open row, (n,), and close the rows that end; tokens of closed rows are ignored."""
    everyone = bool(live.open.all())
    rows, ages, logits = (x if everyone else x[live.open] for x in (live.rows, live.ages, live.logits))
    drawn = draw(logits, None if uniforms is None else uniforms[rows, ages], temperature=temperature)
    goes_on = record.add(rows, ages, drawn)
    choice = torch.zeros_like(live.rows).masked_scatter(live.open, drawn.token)
    live.open = live.open.masked_scatter(live.open, goes_on)
    return choice
