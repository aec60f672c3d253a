"""Engines: what draws responses, and how."""

from lightning_rlhf.engines.decode import decode
from lightning_rlhf.engines.engine import Engine, EngineError, Request, check_sampled
from lightning_rlhf.engines.generation import SamplingParams, row_uniforms
from lightning_rlhf.engines.local import LocalEngine, sample
from lightning_rlhf.engines.response_buffer import Sampled
from lightning_rlhf.engines.vllm import NCCL, AdapterFolder, LocalServer, SharedFolder, VLLMServer, WeightSync

__all__ = [
    "AdapterFolder",
    "NCCL",
    "Engine",
    "EngineError",
    "LocalEngine",
    "LocalServer",
    "Request",
    "Sampled",
    "SamplingParams",
    "SharedFolder",
    "VLLMServer",
    "WeightSync",
    "check_sampled",
    "decode",
    "row_uniforms",
    "sample",
]
