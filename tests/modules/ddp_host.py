"""Runs jobs of `ddp_program` and `standins` on one process or two: `python ddp_host.py FOLDER JOB...`.

A job is `STRATEGY:DEVICES:NAMES:SECONDS`. Its processes are forks of this one, which imports once, and are told their
rank as a cluster's launcher would tell them. What each of them printed is FOLDER/STRATEGY-RANK.log, and how the job
ended FOLDER/STRATEGY.json: the exit status of each process, None where it was still running after SECONDS.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import ddp_program
import standins
import torch
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: F401  here, once for all forks


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(strategy: str, devices: int, rank: int, port: str) -> dict[str, str]:
    """What tells a process its place: of a node its rank, or else of a process on the only node."""
    if devices == 1:
        return {}
    place = {"NODE_RANK": str(rank)} if strategy.endswith("nodes") else {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    return place | {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def forked(folder: Path, strategy: str, devices: int, names: list[str], rank: int, port: str) -> int:
    """The id of a new process that trains and never returns."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / f"{strategy}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(environment(strategy, devices, rank, port))
        train(folder, devices, strategy, names)
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(folder: Path, devices: int, strategy: str, names: list[str]) -> None:
    """Train what is named, one after the other; the first process saves."""
    warnings.filterwarnings("ignore")
    ddp_program.strategy = strategy
    for name in names:
        torch.manual_seed(0)
        start = time.monotonic()
        found = (vars(ddp_program) | vars(standins))[name](folder, devices)
        print(f"{name}: {time.monotonic() - start:.1f} s")
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{name}-{strategy}.pt")


def finish(children: list[int], seconds: float) -> list[int | None]:
    """Exit statuses; what is left after so many seconds is killed."""
    end, statuses = time.monotonic() + seconds, dict.fromkeys(children)
    while any(status is None for status in statuses.values()) and time.monotonic() < end:
        for child in [child for child, status in statuses.items() if status is None]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in [child for child, status in statuses.items() if status is None]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return list(statuses.values())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # whose first call imports the compiler
    if any(job.startswith("zero") for job in sys.argv[2:]):
        standins.ready_deepspeed()
    gc.collect()
    gc.freeze()  # what is imported stays: DeepSpeed collects garbage at every engine
    folder = Path(sys.argv[1])
    for job in sys.argv[2:]:
        strategy, devices, names, seconds = job.split(":")
        port, start = free_port(), time.monotonic()
        ranks = range(int(devices))
        children = [forked(folder, strategy, int(devices), names.split(","), rank, port) for rank in ranks]
        ended = {"statuses": finish(children, float(seconds)), "seconds": time.monotonic() - start}
        (folder / f"{strategy}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
