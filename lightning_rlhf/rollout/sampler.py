"""The weights that sample: the policy's own, or a low-precision copy that is refreshed once a rollout."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.rollout.decode import Sampled, decode
from lightning_rlhf.rollout.generation import Generation
from lightning_rlhf.types import PromptBatch


class Sampler:
    """Draws responses from a policy.

    Not an `nn.Module`: its copy of the weights is no part of the model's state.

    Args:
        policy: whose responses.
        generation: how they are drawn.
    """

    def __init__(self, policy: PolicyModel, generation: Generation) -> None:
        self.policy, self.generation = policy, generation
        self._copy: nn.Module | None = None

    def __call__(self, prompts: PromptBatch, uniforms: Tensor | None, *, samples: int = 1) -> Sampled:
        """Responses to the prompts.

        Args:
            prompts: B prompts.
            uniforms: (B·k, R), float64, in [0, 1); None decodes greedily.
            samples: k, responses to each prompt; those of one prompt follow each other.
        """
        device = prompts.tokens.device.type
        network = self._actor(self._dtype(device))
        ends = self.policy.end_tokens
        with torch.autocast(device, enabled=False):
            return decode(
                network,
                prompts.tokens,
                prompts.mask,
                uniforms,
                samples=samples,
                length=self.generation.max_new_tokens,
                temperature=self.generation.temperature,
                end_tokens=ends,
                pad_token=ends[0],
            )

    def _dtype(self, device: str) -> torch.dtype:
        """What samples: the setting, else what training computes in."""
        if self.generation.dtype is not None:
            return getattr(torch, self.generation.dtype)
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(self.policy.parameters()).dtype

    def _actor(self, dtype: torch.dtype) -> nn.Module:
        """The policy's network, or its copy in `dtype` with today's weights."""
        network = self.policy.network
        if next(network.parameters()).dtype == dtype:
            return network
        with torch.inference_mode(False), torch.no_grad():  # a copy made in `validate` must serve `fit`
            return self._refreshed(network, dtype)

    def _refreshed(self, network: nn.Module, dtype: torch.dtype) -> nn.Module:
        if self._copy is None or next(self._copy.parameters()).dtype != dtype:
            self._copy = copy.deepcopy(network).eval().requires_grad_(False)
            for copied in self._copy.parameters():
                copied.data = copied.data.to(dtype)  # buffers stay: rotary frequencies must not be rounded
        for copied, weight in zip(self._copy.parameters(), network.parameters(), strict=True):
            copied.copy_(weight)
        return self._copy
