"""Samplers: the decode loop and the weights it uses."""

from lightning_rlhf.engines.decode import decode
from lightning_rlhf.engines.generation import SamplingParams, row_uniforms
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.engines.sampler import Sampler

__all__ = [
    "Sampled",
    "Sampler",
    "SamplingParams",
    "decode",
    "row_uniforms",
]
