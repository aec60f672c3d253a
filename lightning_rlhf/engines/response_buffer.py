"""Buffer of responses that grow token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.engines.draw import Draw
from lightning_rlhf.engines.progress import Watch
from lightning_rlhf.types import PromptBatch, Rollout


class Sampled(NamedTuple):
    """Sampled responses with their log-probs.

    Attributes:
        tokens: (B, R), int64, `pad_token` after the end.
        response_mask: (B, R), bool, True up to and including the end token.
        ended: (B,), bool.
        logprobs: of the drawn tokens under the weights that drew them, (B, R), nats, 0 after the end.
        entropy: of the distributions they were drawn from, (B, R), nats, 0 after the end; where an engine does not
            know it, the unbiased −log-prob of the drawn token.
        versions: of the weights that drew each token, (B, R), int64.
    """

    tokens: Tensor
    response_mask: Tensor
    ended: Tensor
    logprobs: Tensor
    entropy: Tensor
    versions: Tensor

    def rollout(self, prompts: PromptBatch) -> Rollout:
        """Combine the responses with their prompts into a rollout; unmeasured fields are zero.

        Args:
            prompts: B prompts, of which each has as many responses, in consecutive rows.
        """
        samples = len(self.tokens) // len(prompts.tokens)
        groups = torch.arange(len(prompts.tokens), device=self.tokens.device).repeat_interleave(samples)
        width = int(self.response_mask.sum(1).max())
        response, unknown = self.response_mask[:, :width], torch.zeros_like(self.logprobs[:, :width])
        return Rollout(
            tokens=torch.cat([prompts.tokens[groups], self.tokens[:, :width]], 1),
            attention_mask=torch.cat([prompts.mask[groups], response], 1),
            response_mask=response,
            ended=self.ended,
            prompt_index=groups,
            sampler_logprobs=self.logprobs[:, :width],
            entropy=self.entropy[:, :width],
            logprobs=unknown,
            ref_logprobs=unknown,
            values=unknown,
        )


class Record:
    """Buffer of the tokens sampled so far.

    Args:
        rows: B.
        length: R, the most tokens of a response.
        pad_token: stands where nothing was drawn.
        end_tokens: ids that end a response.
        device: of all tensors.
        watch: follows it; None for nobody.
    """

    def __init__(
        self,
        rows: int,
        *,
        length: int,
        pad_token: int,
        end_tokens: list[int],
        device: torch.device,
        watch: Watch | None = None,
    ) -> None:
        self.length, self._ends = length, torch.tensor(end_tokens, device=device)
        self._tokens = torch.full((rows, length), pad_token, device=device)
        self._response = torch.zeros_like(self._tokens, dtype=torch.bool)
        self._numbers = torch.zeros(2, rows, length, dtype=torch.float64, device=device)
        self._ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._dtype, self._watch = torch.float32, watch
        if watch is not None:
            watch.begin(rows, device)

    def add(self, rows: Tensor, places: Tensor, drawn: Draw) -> Tensor:
        """Append a token to each of some responses.

        Args:
            rows: which, (b,), int64.
            places: how many tokens each has already, (b,), int64.
            drawn: b tokens.

        Returns:
            (b,), bool: the response can go on.
        """
        ended = torch.isin(drawn.token, self._ends)
        self._tokens[rows, places], self._response[rows, places] = drawn.token, True
        self._numbers[:, rows, places] = torch.stack([drawn.logprob, drawn.entropy]).double()
        self._ended[rows] = ended
        self._dtype = drawn.logprob.dtype
        goes_on = ~ended & (places + 1 < self.length)
        if self._watch is not None:
            self._watch.add(goes_on)
        return goes_on

    def sampled(self) -> Sampled:
        """Return all responses, in the precision of the logits."""
        if self._watch is not None:
            self._watch.end()
        logprobs, entropy = self._numbers.to(self._dtype)
        return Sampled(
            tokens=self._tokens,
            response_mask=self._response,
            ended=self._ended,
            logprobs=logprobs,
            entropy=entropy,
            versions=torch.zeros_like(self._tokens),
        )
