"""vLLM as an engine: a server in a process of its own that gets the weights of each rollout."""

from lightning_rlhf.engines.vllm.local_server import LocalServer
from lightning_rlhf.engines.vllm.lora import AdapterFolder
from lightning_rlhf.engines.vllm.nccl import NCCL
from lightning_rlhf.engines.vllm.process import ServerProcess
from lightning_rlhf.engines.vllm.server import VLLMServer
from lightning_rlhf.engines.vllm.sync import SharedFolder, WeightSync

__all__ = ["AdapterFolder", "NCCL", "LocalServer", "ServerProcess", "SharedFolder", "VLLMServer", "WeightSync"]
