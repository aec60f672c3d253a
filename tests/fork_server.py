"""Runs programs as forks of one process, which imports once: `python fork_server.py LISTENER`, a socket's number.

A program is asked for by `fork_client`, which stands for `python`: with its arguments, folder, environment and streams
the fork goes on as an interpreter that has imported would. It is killed when the client is, and all are when standard
input ends.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

Request = dict[str, Any]


def received(connection: socket.socket) -> tuple[Request, list[int]]:
    """What a client asks for, and its standard streams."""
    head, streams, *_ = socket.recv_fds(connection, 8, 3)
    size, body = int.from_bytes(head, "big"), b""
    while len(body) < size:
        body += connection.recv(size - len(body))
    return json.loads(body), streams


def reap(children: dict[int, socket.socket], gone: list[socket.socket]) -> None:
    """Tell clients how their programs ended; kill the programs of clients that are gone."""
    for child, client in list(children.items()):
        if client in gone:
            os.kill(child, signal.SIGKILL)
        done, status = os.waitpid(child, 0 if client in gone else os.WNOHANG)
        if done:
            del children[child]
            if client not in gone:
                client.send(os.waitstatus_to_exitcode(status).to_bytes(2, "big", signed=True))
            client.close()


def serve(listener: socket.socket) -> Request:
    """Fork for every client; returns in each fork, with the client's streams in place, what it is to run."""
    children: dict[int, socket.socket] = {}
    while True:
        ready, *_ = select.select([sys.stdin, listener, *children.values()], [], [], 0.01 if children else None)
        reap(children, [client for client in children.values() if client in ready])
        if sys.stdin in ready:
            reap(children, list(children.values()))
            sys.exit()
        if listener in ready:
            client, _ = listener.accept()
            request, streams = received(client)
            child = os.fork()
            if child == 0:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                for unused in (listener, client, *children.values()):
                    unused.close()
            for stream in streams:
                os.close(stream)
            if child == 0:
                return request
            children[child] = client


def run(request: Request) -> None:
    """As `python -m NAME ARGUMENTS` or `python FILE ARGUMENTS` does."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["arguments"]
    sys.executable, sys.argv = request["executable"], [first, *rest]
    if first == "-m":
        sys.path[0], sys.argv = request["folder"], rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def prepare() -> None:
    """Import what programs import, and keep it out of the garbage collector's way."""
    import torch
    from transformers import (  # noqa: F401
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    import lightning_rlhf.cli.command  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)  # whose first call imports the compiler
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    prepare()
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
