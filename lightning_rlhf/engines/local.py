"""Engine that samples in the training process, from the policy's network or a low-precision copy for one rollout."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rlhf.engines.decode import decode
from lightning_rlhf.engines.engine import Engine, Request
from lightning_rlhf.engines.generation import SamplingParams
from lightning_rlhf.engines.hf_generate import generate
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.models.cache import why_no_cache
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.sampling_copy import make_actor
from lightning_rlhf.types import PromptBatch

logger = logging.getLogger(__name__)


class LocalEngine(Engine):
    """Engine in the training process: the default.

    It is no `nn.Module` and owns no weights between rollouts: it samples from those the policy has at that time. Its
    tokens are a function of the request's numbers, so that a run repeats to the bit.
    """

    is_external = False

    def __init__(self) -> None:
        self.policy: PolicyModel | None = None
        self.version = 0
        self.decode: Callable[..., Sampled] = decode

    def load(self, policy: PolicyModel, version: int) -> None:
        """Sample from the policy's own weights from now on."""
        self.version = version
        if policy is self.policy:
            return
        self.policy = policy
        reason = why_no_cache(policy.network)
        if reason is not None:
            logger.info("sampling by transformers' `generate`, which is slower: %s", reason)
        self.decode = decode if reason is None else generate

    def generate(self, request: Request) -> Sampled:
        """Draw the responses by the decode loop, or by transformers' `generate` where a network needs that.

        Raises:
            RuntimeError: no weights were loaded.
        """
        policy, params = self.policy, request.params
        if policy is None:
            raise RuntimeError("no weights were loaded: call `load` before `generate`")
        cached = self.decode is not generate
        device = request.prompts.tokens.device.type
        dtype = self.copy_dtype(policy, params, device)
        passes = params.max_new_tokens if cached else 1
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            sampled = self.decode(
                make_actor(policy.network, dtype, passes=passes, blueprint=policy.blueprint),
                request.prompts.tokens,
                request.prompts.mask,
                request.uniforms,
                samples=request.samples,
                length=params.max_new_tokens,
                temperature=params.temperature,
                end_tokens=list(request.end_tokens),
                pad_token=request.end_tokens[0],
                watch=self.watch,
                **({"slots": params.slots} if cached else {}),
            )
            return sampled._replace(versions=torch.full_like(sampled.tokens, self.version))

    def copy_dtype(self, policy: PolicyModel, params: SamplingParams, device: str) -> torch.dtype:
        """Return the dtype of the sampling weights: the setting, or else the training dtype.

        Raises:
            ValueError: the weights are quantized, and the setting asks for another than theirs.
        """
        if is_quantized(policy.network):
            own = next(policy.parameters()).dtype
            if params.dtype is not None and getattr(torch, params.dtype) != own:
                raise ValueError(
                    f"`generation.dtype`={params.dtype}: a quantized policy samples from its own weights, in {own}: "
                    "leave it out, or set `policy.dtype`"
                )
            return own
        return policy.computing_dtype(device) if params.dtype is None else getattr(torch, params.dtype)


def sample(
    policy: PolicyModel, prompts: PromptBatch, uniforms: Tensor | None, params: SamplingParams, *, samples: int = 1
) -> Sampled:
    """Draw responses of a policy in this process.

    Args:
        policy: whose responses.
        prompts: B prompts.
        uniforms: (B·k, R), float64, in [0, 1); None decodes greedily.
        params: how they are drawn.
        samples: k, responses to each prompt; those of one prompt follow each other.
    """
    engine = LocalEngine()
    engine.load(policy, version=0)
    request = Request(prompts=prompts, samples=samples, uniforms=uniforms, params=params, end_tokens=policy.end_tokens)
    return engine.generate(request)
