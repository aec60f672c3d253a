"""Process of a vLLM server, from its start to an end that leaves nothing behind."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from lightning_rlhf.engines.engine import EngineError
from lightning_rlhf.engines.vllm.local_server import LOOPBACK, LocalServer, free_port, probe
from lightning_rlhf.engines.vllm.untied import TIED, UNTIED, is_tied, write_untied_copy
from lightning_rlhf.models.exported import cached_folder, exported_folder, lacks_tokenizer, structure

LAST = 12
"""Lines of the log in the message that the server died."""
GRACE = 20.0
"""Seconds between the request to end and the kill."""
LINGER = 2.0
"""Seconds that its children may live on after it."""
SLOWEST_START = 3600.0
"""Seconds after which a server that does not answer is given up."""
ANYWHERE = ("0.0.0.0", "::")
WATCH = """
read -r _
kill -s TERM -- "-$1"
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -s 0 -- "-$1" && sleep 1; done
kill -s KILL -- "-$1"
rm -rf -- "$2"
"""
"""Shell program that outlives a killed parent: its input ends with it, and then so does the server."""


class ServerProcess:
    """vLLM server of a policy, in a group of processes of its own.

    As a context it is started and awaited, and stopped at the end. It is stopped as well when the interpreter ends,
    however that ends.

    Args:
        policy: a folder written by `save_pretrained`, or a hub name.
        server: its options.
        host: address that it listens at.
        log: file that its log is added to; None is stderr.
        work: folder that is removed with it; None makes one.

    Raises:
        ValueError: the policy cannot be served.
    """

    def __init__(
        self,
        policy: str,
        server: LocalServer,
        *,
        host: str = LOOPBACK,
        log: Path | None = None,
        work: Path | None = None,
    ) -> None:
        self.policy, self.server, self.host, self.log = policy, server, host, log
        self.folder = exported_folder(policy)
        self.port = 0
        self._work = work
        self._told: float | None = None
        self._process: subprocess.Popen[str] | None = None
        self._tail: deque[str] = deque(maxlen=LAST)
        self._end: weakref.finalize[..., Any] | None = None

    @property
    def url(self) -> str:
        """Address by which this machine reaches the server."""
        host = LOOPBACK if self.host in ANYWHERE else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """True between start and end."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and return before it answers.

        Raises:
            ValueError: vLLM is not installed, or the port is taken.
        """
        self._work = self._work or Path(tempfile.mkdtemp(prefix="lightning_rlhf-serve-"))
        self._end = weakref.finalize(self, _remove, self._work, os.getpid())
        on_gpu = probe(self.server).gpu
        self.port = free_port(self.host, self.server.port)
        model, name = self._served(on_gpu=on_gpu)
        command = self.server.command(model, name=name, host=self.host, port=self.port, on_gpu=on_gpu)
        if self.folder is not None and lacks_tokenizer(self.folder):
            command.append("--skip-tokenizer-init")
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        variables = self.server.environment(offline=self.folder is not None, on_gpu=on_gpu)
        self._process = subprocess.Popen(
            command, env=variables, text=True, errors="replace", start_new_session=True, **pipes
        )
        self._end.detach()
        watcher = _watcher(self._process.pid, self._work)
        self._end = weakref.finalize(self, _stop, self._process, watcher, self._work, os.getpid())
        self._reader = threading.Thread(target=_copy, args=(self._process.stdout, self._tail, self.log), daemon=True)
        self._reader.start()

    def wait_until_healthy(self) -> bool:
        """Wait until the server answers; return False if it was told to end before.

        Raises:
            EngineError: it ended by itself, or does not answer for an hour.
        """
        deadline = time.monotonic() + SLOWEST_START
        while self.is_running and not _answers(f"{self.url}/health"):
            if time.monotonic() > deadline:
                raise EngineError(f"the vLLM server at {self.url} does not answer after {SLOWEST_START:.0f} s")
            self._hasten()
            time.sleep(0.25)
        if self.is_running:
            return True
        if self._told is None:
            self._reader.join(timeout=5.0)
            said = "\n".join(self._tail) or "nothing"
            raise EngineError(f"the vLLM server ended while it started, status {self.wait()}; its log ends:\n{said}")
        return False

    def tell(self, number: int) -> None:
        """Pass on a signal that asks the server to end; it is killed when it does not, or when told twice."""
        if self._process is None:
            raise KeyboardInterrupt
        if self._told is not None:
            _signal(self._process.pid, signal.SIGKILL)
        self._told = time.monotonic()
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait until the server ends and return its status, −n if signal n ended it."""
        if self._process is None:
            return 0
        while (status := self._process.poll()) is None:
            self._hasten()
            time.sleep(0.1)
        return status

    def stop(self) -> None:
        """End the server with its children and remove what was written."""
        if self._end is not None:
            self._end()
        self._end = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _hasten(self) -> None:
        """Kill a server that was told to end long ago."""
        if self._process is not None and self._told is not None and time.monotonic() > self._told + GRACE:
            _signal(self._process.pid, signal.SIGKILL)

    def _served(self, *, on_gpu: bool) -> tuple[str, str]:
        """Return the model that vLLM reads and the name under which it is served."""
        if on_gpu:
            return (self.policy if self.folder is None else str(self.folder)), TIED
        folder = self.folder or cached_folder(self.policy)
        if not is_tied(structure(folder)):
            return str(folder), TIED
        copy = Path(str(self._work), UNTIED)
        copy.mkdir()
        write_untied_copy(folder, copy)
        return str(copy), UNTIED


def _answers(url: str) -> bool:
    """Return True if a server is there and well; no proxy is asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, http.client.HTTPException), opener.open(url, timeout=5.0) as answer:
        return answer.status == 200
    return False


def _copy(lines: Iterable[str], tail: deque[str], log: Path | None) -> None:
    """Pass lines on and keep the last ones."""
    with nullcontext(sys.stderr) if log is None else log.open("a", encoding="utf-8") as file:
        for line in lines:
            tail.append(line.rstrip())
            with suppress(OSError, ValueError):  # a full disk, a closed terminal: the server need not stop for that
                file.write(line)
                file.flush()


def _watcher(group: int, work: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        ["sh", "-c", WATCH, "sh", str(group), str(work)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _remove(work: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork of the process has the object too
        shutil.rmtree(work, ignore_errors=True)


def _stop(process: subprocess.Popen[str], watcher: subprocess.Popen[bytes], work: Path, owner: int) -> None:
    """End a group of processes and its watcher and remove the folder."""
    if os.getpid() != owner:
        return
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C
            process.wait(GRACE)
    deadline = time.monotonic() + LINGER
    while _signal(process.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(process.pid, signal.SIGKILL)
    process.wait()
    _signal(watcher.pid, signal.SIGKILL)
    watcher.communicate()
    shutil.rmtree(work, ignore_errors=True)


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group of processes; return False if there is none."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS refuses where all that is left are zombies
        return False
    return True
