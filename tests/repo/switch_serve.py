"""Switches of servers on this machine: the words and variables that one is started with."""

from __future__ import annotations

import socket
from typing import Any

from switch_bench import Bench
from switch_harness import Table, case, to

from lightning_rlhf.engines import LocalServer
from lightning_rlhf.engines.vllm.local_server import LOOPBACK, free_port


def table(bench: Bench) -> Table:
    first, second = free_ports()
    return {
        LocalServer: case(
            started,
            {"port": first},
            python=to("ENV/bin/python"),
            port=to(second, by=port_of),
            dtype=to("bfloat16"),
            max_model_len=to(64),
            max_num_seqs=to(8),
            tensor_parallel_size=to(2),
            devices=to("1"),
            options=to(["--seed", "1"]),
        )
    }


def started(server: LocalServer) -> list[Any]:
    variables = server.environment(offline=True, on_gpu=True)
    return [server.command("folder", name="policy", host=LOOPBACK, port=8000, on_gpu=True), variables]


def port_of(server: LocalServer) -> int:
    return free_port(LOOPBACK, server.port)


def free_ports() -> list[int]:
    listeners = [socket.create_server((LOOPBACK, 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
