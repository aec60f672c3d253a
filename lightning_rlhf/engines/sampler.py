"""Sampler of responses from the policy's network or from a low-precision copy made for one rollout."""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from lightning_rlhf.engines.decode import decode
from lightning_rlhf.engines.generation import SamplingParams
from lightning_rlhf.engines.hf_generate import generate
from lightning_rlhf.engines.progress import Watch
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.models.cache import why_no_cache
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.sampling_copy import make_actor
from lightning_rlhf.types import PromptBatch

logger = logging.getLogger(__name__)


class Sampler:
    """Sampler of responses from a policy.

    It is not an `nn.Module` and owns no weights between rollouts.

    Args:
        policy: whose responses.
        generation: how they are drawn.

    Attributes:
        watch: follows the drawing while it is set.
    """

    def __init__(self, policy: PolicyModel, generation: SamplingParams) -> None:
        self.policy, self.generation = policy, generation
        self.watch: Watch | None = None
        reason = why_no_cache(policy.network)
        if reason is not None:
            logger.info("sampling by transformers' `generate`, which is slower: %s", reason)
        self.decode = partial(decode, slots=generation.slots) if reason is None else generate
        self.passes = generation.max_new_tokens if reason is None else 1

    def __call__(self, prompts: PromptBatch, uniforms: Tensor | None, *, samples: int = 1) -> Sampled:
        """Sample responses to the prompts.

        Args:
            prompts: B prompts.
            uniforms: (B·k, R), float64, in [0, 1); None decodes greedily.
            samples: k, responses to each prompt; those of one prompt follow each other.
        """
        device, length = prompts.tokens.device.type, self.generation.max_new_tokens
        ends, dtype = self.policy.end_tokens, self.dtype(device)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return self.decode(
                make_actor(self.policy.network, dtype, passes=self.passes, blueprint=self.policy.blueprint),
                prompts.tokens,
                prompts.mask,
                uniforms,
                samples=samples,
                length=length,
                temperature=self.generation.temperature,
                end_tokens=ends,
                pad_token=ends[0],
                watch=self.watch,
            )

    def dtype(self, device: str) -> torch.dtype:
        """Return the dtype of the sampling weights: the setting, or else the training dtype.

        Args:
            device: type of the device, whose autocast is asked.
        """
        if self.generation.dtype is not None:
            return getattr(torch, self.generation.dtype)
        return self.training_dtype(device)

    def training_dtype(self, device: str) -> torch.dtype:
        """Return the dtype of training: that of autocast, or else of the weights."""
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(self.policy.parameters()).dtype
