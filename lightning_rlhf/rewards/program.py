"""Reward by a program of the user, run for each response within limits."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.core.checks import check_count, check_finite, check_positive
from lightning_rlhf.rewards.concurrent import each_in_threads
from lightning_rlhf.rewards.reward import Scores, TextReward
from lightning_rlhf.types import Rollout, Row

LIMITER = Path(__file__).with_name("limiter_program.py")
LAST = 4096
"""Bytes of an output that are read, from its end."""


class Run(NamedTuple):
    """Outcome of a program for one response.

    Attributes:
        score: its number; None if it gave none.
        problem: why not, empty if there is a score.
        late: whether it was ended from outside, as at a time limit.
    """

    score: float | None
    problem: str = ""
    late: bool = False


class ProgramReward(TextReward):
    """Score of a response by a program, run once for each with limits on what it uses.

    The program reads `{"prompt": …, "response": …, "columns": {…}}`, JSON, from its standard input; the last line of
    its output is the score. It runs in an empty folder of its own, without the environment of the run (`PATH` alone is
    kept, so no secrets), and is ended with its process group. A run that is late, ends with another code than 0 or
    writes no number scores `failed`, and their share is logged as the part `failed`. Where no run of a rollout gave a
    number and not all were late, the program itself is at fault: that is an error, which shows what it wrote.

    These limits are no sandbox: the program can read the user's files, ask the network and start what outlives it. To
    run what a model wrote, let the command be a sandbox: a container, `bwrap`, another user without rights.

    Args:
        command: program and arguments. `python` is this interpreter; an argument that is a file here is passed by its
            full path, since the program runs elsewhere.
        seconds: most wall time of a run; each of its processes has a second more of CPU time.
        memory: most address space of each process, bytes.
        file_size: most bytes of a file that it writes, its output included.
        processes: most processes of the user, as the system counts: those of all programs together; None sets no limit.
        concurrency: most runs at a time, of each process of the training.
        failed: score of a run that failed.

    Raises:
        ValueError: `command` is empty or no program, or a number is out of range; or the system is no POSIX.
    """

    def __init__(
        self,
        command: list[str],
        seconds: float = 10.0,
        memory: int = 2**31,
        file_size: int = 2**26,
        processes: int | None = None,
        concurrency: int = 4,
        failed: float = 0.0,
    ) -> None:
        check_positive(seconds=seconds, memory=memory, file_size=file_size, processes=processes or 1)
        check_count(concurrency=concurrency)
        check_finite(failed=failed)
        if os.name != "posix":
            raise ValueError("ProgramReward needs a POSIX system, whose processes have limits")
        self.command, self.seconds, self.memory, self.file_size = list(command), seconds, memory, file_size
        self.processes, self.concurrency, self.failed = processes, concurrency, failed
        limits = {"AS": memory, "CPU": math.ceil(seconds) + 1, "FSIZE": file_size, "CORE": 0}
        limits |= {} if processes is None else {"NPROC": processes}
        self._argv = [sys.executable, "-I", "-S", str(LIMITER), json.dumps(limits), *_located(self.command)]

    def identity(self) -> dict[str, Any]:
        """Describe what decides the scores."""
        return {name: value for name, value in super().identity().items() if name != "concurrency"}

    def score(self, prompts: list[Any], responses: list[str], /, **columns: list[Any]) -> list[float]:
        """Return the score of each response.

        Raises:
            RuntimeError: no run gave a number, and not because all were late.
        """
        return [self.failed if run.score is None else run.score for run in self._runs(prompts, responses, columns)]

    def __call__(self, rollout: Rollout, rows: Sequence[Row]) -> Tensor:
        """Return the scores, (B,), float32."""
        return self.scored(rollout, rows).total

    def scored(self, rollout: Rollout, rows: Sequence[Row]) -> Scores:
        """Return the scores; the part `failed` is 1 where the program gave no number."""
        names = sorted({name for row in rows for name in row} - {"prompt"})
        columns = {name: [row.get(name) for row in rows] for name in names}
        runs = self._runs([row.get("prompt") for row in rows], self.responses(rollout), columns)
        failed = torch.tensor([run.score is None for run in runs], device=rollout.tokens.device)
        total = torch.tensor([run.score or 0.0 for run in runs], dtype=torch.float32, device=rollout.tokens.device)
        return Scores(total.masked_fill(failed, self.failed), {"failed": failed.float()})

    def _runs(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> list[Run]:
        def run(i: int) -> Run:
            cells = {name: values[i] for name, values in columns.items()}
            return self._run({"prompt": prompts[i], "response": responses[i], "columns": cells})

        runs = each_in_threads(run, prompts, most=self.concurrency, source=f"the reward {self._name()}")
        wrong = [run.problem for run in runs if not run.late]
        if wrong and all(run.score is None for run in runs):
            raise RuntimeError(
                f"{' '.join(self.command)} gave no number for any of {len(runs)} responses, the first time since it "
                f"{wrong[0]}: try it by hand with JSON on its standard input"
            )
        return runs

    def _run(self, request: dict[str, Any]) -> Run:
        with tempfile.TemporaryDirectory(prefix="reward-", ignore_cleanup_errors=True) as place:
            home = Path(place, "home")
            home.mkdir()
            asked, said, told = (Path(place, name) for name in ("input", "output", "errors"))
            asked.write_text(json.dumps(request, default=str), encoding="utf-8")
            with asked.open("rb") as stdin, said.open("wb") as stdout, told.open("wb") as stderr:
                process = subprocess.Popen(
                    self._argv,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    cwd=home,
                    env=_environment(home),
                    start_new_session=True,
                )
                try:
                    code = process.wait(self.seconds)
                except subprocess.TimeoutExpired:
                    return Run(None, f"took more than {self.seconds:g} s", late=True)
                finally:
                    _end(process)
            return _read(code, _tail(said), _tail(told))


def _located(command: list[str]) -> list[str]:
    """Return the command with full paths.

    Raises:
        ValueError: it is empty or no program.
    """
    if not command:
        raise ValueError('`command` must name a program, such as ["python", "grade.py"]: got an empty list')
    program = sys.executable if command[0] == "python" else shutil.which(command[0])
    if program is None:
        raise ValueError(f"`command`: there is no program {command[0]!r}: write its path, or install it")
    return [
        os.path.abspath(program),
        *(os.path.abspath(word) if os.path.isfile(word) else word for word in command[1:]),
    ]


def _environment(home: Path) -> dict[str, str]:
    """Return all variables that a program gets."""
    place = str(home)
    threads = {"OMP_NUM_THREADS": "1"}
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": place, "TMPDIR": place, "LC_ALL": "C.UTF-8"} | threads


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(path: Path) -> str:
    """Return the end of a file as text."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LAST))
        return file.read().decode(errors="replace").strip()


def _read(code: int, output: str, errors: str) -> Run:
    """Return the outcome of a program that ended."""
    if code == -signal.SIGKILL:
        return Run(None, "was killed, by the limit of CPU time or for memory", late=True)
    if code != 0:
        return Run(None, f"ended with code {code} ({errors[-300:] or 'no message'})")
    last = output.rpartition("\n")[2]
    try:
        score = float(last)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        return Run(None, f"wrote {last[-80:]!r} and no number as its last line")
    return Run(score)
