"""`lightning-rlhf serve POLICY`: a vLLM server that a run samples on."""

from __future__ import annotations

import argparse
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lightning_rlhf.engines.vllm import LocalServer, ServerProcess
from lightning_rlhf.engines.vllm.client import is_loopback
from lightning_rlhf.engines.vllm.process import ANYWHERE
from lightning_rlhf.text.escape import terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> None:
    """Start a server and end with it.

    Raises:
        SystemExit: its status, or 2 where the arguments are not valid.
        ValueError: the policy cannot be served, vLLM is not installed, or the port is taken.
        EngineError: the server ended while it started.
    """
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    parser = _parser()
    chosen = parser.parse_args(words[:end])
    if not (is_loopback(chosen.host) or chosen.private_network):
        parser.error(
            f"--host {chosen.host}: whoever reaches the server can exchange its weights, it has no password: add "
            "--private-network if only your machines reach it"
        )
    server = LocalServer(
        python=chosen.python,
        port=chosen.port,
        dtype=chosen.dtype,
        max_model_len=chosen.max_model_len,
        max_num_seqs=chosen.max_num_seqs,
        tensor_parallel_size=chosen.tensor_parallel_size,
        options=words[end + 1 :],
    )
    process = ServerProcess(chosen.policy, server, host=chosen.host)
    try:
        with _passed_on(process), process:
            if process.is_running:
                print(_ready(process, private=chosen.private_network), flush=True)
            status = process.wait()
    except KeyboardInterrupt:  # before there was a server
        status = -signal.SIGINT
    raise SystemExit(status if status >= 0 else 128 - status)


@contextmanager
def _passed_on(process: ServerProcess) -> Iterator[None]:
    """Context in which signals that end a program reach the server."""

    def tell(number: int, frame: FrameType | None) -> None:
        process.tell(number)

    before = {number: signal.signal(number, tell) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ready(process: ServerProcess, *, private: bool) -> str:
    """Return the line that says how a run uses the server."""
    url = f"http://{socket.gethostname()}:{process.port}" if process.host in ANYWHERE else process.url
    flags = f"--model.engine=VLLMServer --model.engine.urls='[{url}]'"
    flags += " --model.engine.private_network=true" if private else ""
    return terminal(f"vLLM serves {process.policy} at {url}; train with {flags}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-rlhf serve",
        description="Start a vLLM server that a run samples on and sends its weights to. What follows -- goes to vLLM.",
        epilog="lightning-rlhf serve runs/sft/model --python ENV/bin/python -- --gpu-memory-utilization 0.8",
        allow_abbrev=False,
    )
    parser.add_argument("policy", help="a folder written by `save_pretrained` or the export of a run, or a hub name")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="address that it listens at")
    parser.add_argument("--private-network", action="store_true", help="allow a host that other machines reach")
    parser.add_argument("--python", metavar="ENV/bin/python", help="of the environment that vLLM is installed in")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="precision of the server")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="most tokens of prompt and response")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="most responses drawn at the same time")
    parser.add_argument("--tensor-parallel-size", type=int, metavar="N", help="GPUs that the weights are split over")
    return parser
