"""vLLM server that a run starts for itself."""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_rlhf.engines.engine import EngineError, Processes
from lightning_rlhf.engines.vllm.local_server import LocalServer
from lightning_rlhf.engines.vllm.process import ServerProcess
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.models.policy import PolicyModel

logger = logging.getLogger(__name__)

LOG = "vllm.log"
"""File in the run's folder that the server's log is added to."""
FOLDER = "policy"


def start_for_run(
    policy: PolicyModel, server: LocalServer, ranks: Processes | None
) -> tuple[ServerProcess | None, str]:
    """Start a server of today's policy and return it with its address; only the first process holds it.

    Args:
        policy: that is served; an adapter is folded in. All processes must call this.
        server: how.
        ranks: processes of the run; None: this one alone.

    Raises:
        EngineError: it does not start, or a process of the run is on another machine.
        ValueError: vLLM is not installed, or the port is taken.
        OSError: the policy cannot be written.
    """
    _check_one_machine(ranks)
    process: ServerProcess | None = None
    problem: Exception | None = None
    try:
        work = _written(policy, is_first=ranks is None or ranks.rank == 0)
        if work is not None:
            process = _started(policy, server, work, log=Path(LOG) if ranks is None else ranks.folder / LOG)
    except Exception as error:  # any: the other processes wait
        problem = error
    if ranks is not None:
        ranks.agree(problem)
    elif problem is not None:
        raise problem
    url = "" if process is None else process.url
    return process, url if ranks is None else ranks.gather_text(url)


def _written(policy: PolicyModel, *, is_first: bool) -> Path | None:
    """Write the policy into a temporary folder and return that; None if another process writes it."""
    if not is_first:
        if policy.blueprint is not None:  # its weights are gathered from all processes
            policy.save_pretrained(FOLDER)
        return None
    work = Path(tempfile.mkdtemp(prefix="lightning_rlhf-serve-"))
    try:
        policy.save_pretrained(work / FOLDER, merge_adapter=is_adapted(policy.network))
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return work


def _started(policy: PolicyModel, server: LocalServer, work: Path, *, log: Path) -> ServerProcess:
    """Start the server of the written policy in the precision of the training and wait until it answers."""
    dtype: Any = str(policy.computing_dtype(next(policy.parameters()).device.type)).removeprefix("torch.")
    process = ServerProcess(str(work / FOLDER), replace(server, dtype=server.dtype or dtype), log=log, work=work)
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting vLLM for this run, which writes to %s", log)
    process.__enter__()
    return process


def _check_one_machine(ranks: Processes | None) -> None:
    """Raise EngineError if a process of the run could not reach a server of the first."""
    machines = {socket.gethostname()} if ranks is None else set(ranks.gather_text(f"{socket.gethostname()} ").split())
    if len(machines) > 1:
        raise EngineError(
            f"`serve` starts a server on one machine, and the run is on {len(machines)}: start it by `lightning-rlhf "
            "serve --private-network` and name it in `urls`"
        )
