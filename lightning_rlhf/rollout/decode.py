"""The decode loop: one prefill, then one token per pass, with the log-probs that the logits give for nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from lightning_rlhf.core.logprobs import full_precision, token_logprobs
from lightning_rlhf.models.policy import positions


class Sampled(NamedTuple):
    """Responses as they were drawn.

    Attributes:
        tokens: (B, R), int64, `pad_token` after the end.
        response: (B, R), bool, True up to and including the end token.
        ended: (B,), bool.
        logprobs: of the drawn tokens under the weights that drew them, (B, R), nats, 0 after the end.
    """

    tokens: Tensor
    response: Tensor
    ended: Tensor
    logprobs: Tensor


def inverse_cdf(logits: Tensor, uniforms: Tensor, *, block: int = 256) -> Tensor:
    """Tokens distributed as softmax(logits): the first whose cumulative probability exceeds u.

    First the block of the vocabulary, then the token in it, so that only one block is summed token by token. The
    running sums are float64: in float32, over a whole vocabulary, up to 2e-4 of the mass can never be drawn.

    Args:
        logits: (B, V), already divided by the temperature.
        uniforms: (B,), float64, in [0, 1).
        block: tokens per block.

    Returns:
        (B,), int64; a token of probability 0 is never drawn.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    blocks = pad(full_precision(logits).softmax(-1), (0, -logits.shape[1] % block)).unflatten(1, (-1, block))
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    if not mass[:, -1].isfinite().all():
        raise ValueError(
            "the policy's logits are not finite: it diverged; lower the learning rate, or sample in float32"
        )
    which, before = _first_above(mass, uniforms.to(mass.device).unsqueeze(1) * mass[:, -1:])
    inside = blocks.gather(1, which.unsqueeze(2).expand(-1, -1, block)).squeeze(1).cumsum(-1, dtype=torch.float64)
    token, _ = _first_above(inside, before)
    return (which * block + token).squeeze(1)


def _first_above(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first sum above the target, and what of the target is left at that index, (B, 1) each."""
    below_all = torch.minimum(target, cumulative[:, -1:] * (1 - 2**-52))  # rounding must not run past the last sum
    index = torch.searchsorted(cumulative, below_all, right=True)
    sums = pad(cumulative, (1, 0))
    return index, (below_all - sums.gather(1, index)).clamp(min=0)


class _Decoder:
    """The network, its cache and the mask that grows with every token."""

    def __init__(self, network: nn.Module, tokens: Tensor, mask: Tensor) -> None:
        self.network, self.mask = network, mask
        self.cache = DynamicCache(config=network.config)
        self.logits = self._forward(tokens, positions(mask))

    def _forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        output: Any = self.network(
            input_ids=tokens,
            attention_mask=self.mask.long(),
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def advance(self, tokens: Tensor) -> None:
        """Append a token to every row."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.logits = self._forward(tokens.unsqueeze(1), self.mask.sum(1, keepdim=True) - 1)

    def repeat(self, samples: int) -> None:
        """Put `samples` rows in the place of each: a prompt is read once, however many responses it gets."""
        self.mask, self.logits = (x.repeat_interleave(samples, 0) for x in (self.mask, self.logits))
        self.cache.batch_repeat_interleave(samples)

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


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
) -> Sampled:
    """Responses drawn token by token; ended rows leave the batch once they are a quarter of it.

    Args:
        network: a causal language model with a key-value cache.
        tokens: prompts, (B, P), int64, padded on the left.
        mask: real prompt tokens, (B, P), bool.
        uniforms: (B·samples, length), float64; None decodes greedily.
        samples: responses to each prompt, in consecutive rows.
        length: R, the most tokens of a response.
        temperature: τ.
        end_tokens: ids that end a response.
        pad_token: id written after the end.
    """
    rows = torch.arange(len(tokens) * samples, device=tokens.device)
    ends = torch.tensor(end_tokens, device=tokens.device)
    drawn = torch.full((len(rows), length), pad_token, device=tokens.device)
    logprobs = torch.zeros(drawn.shape, dtype=torch.float64, device=tokens.device)
    response = torch.zeros_like(drawn, dtype=torch.bool)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    decoder = _Decoder(network, tokens, mask)
    if samples > 1:
        decoder.repeat(samples)
    for t in range(length):
        scaled = full_precision(decoder.logits) / temperature
        choice = scaled.argmax(-1) if uniforms is None else inverse_cdf(scaled, uniforms[rows.cpu(), t])
        alive = ~ended[rows]
        live = rows[alive]
        drawn[live, t], response[live, t] = choice[alive], True
        logprobs[live, t] = token_logprobs(scaled, choice)[alive].double()
        ended[live] = torch.isin(choice[alive], ends)
        alive = ~ended[rows]
        if t + 1 == length or not alive.any():
            break
        if alive.sum() <= 0.75 * len(rows):
            decoder.keep(alive.nonzero().squeeze(1))
            rows, choice = rows[alive], choice[alive]
        decoder.advance(choice)
    return Sampled(drawn, response, ended, logprobs.to(scaled.dtype))
