"""Rows of a Reasoning Gym task, with parts that are disjoint by content."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning_rlhf.data.tables import TableRecord, table_records

PROGRAM = Path(__file__).with_name("reasoning_gym_program.py")
QUESTION = "{question}"
"""Place of the question in an instruction."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGymRows:
    """Rows of a procedural task, the same for the same arguments on every process.

    Each has the `prompt`, the task's own `answer`, and in `reasoning_gym` what the reward `ReasoningGym` grades by.
    Equal questions are one row. A question's digest decides its part, so that `train` and `val` share none whatever
    their size and seed. In a config it is a mapping of its arguments: `train: {task: chain_sum, part: train}`.

    Args:
        task: its name in Reasoning Gym.
        size: questions that are made, before equal ones and the other part are left out.
        seed: of the questions.
        part: `train`, `val`, or `all` for both.
        share: of all questions that are `val`, between 0 and 1.
        config: settings of the task, such as `{"min_terms": 2}`.
        instruction: the prompt, with `{question}` where the question goes.

    Raises:
        ValueError: a number is out of range, `part` is another word, or the instruction has no place for the question.
    """

    task: str
    size: int = 1000
    seed: int = 0
    part: Literal["all", "train", "val"] = "all"
    share: float = 0.1
    config: dict[str, Any] = field(default_factory=dict)
    instruction: str = QUESTION

    def __post_init__(self) -> None:
        if self.size < 1 or self.seed < 0:
            raise ValueError(f"`size` must be at least 1 and `seed` 0: got {self.size} and {self.seed}")
        if not 0 < self.share < 1:
            raise ValueError(f"`share` must be between 0 and 1: got {self.share}")
        if self.part not in ("all", "train", "val"):
            raise ValueError(f"`part` must be all, train or val: got {self.part!r}")
        if QUESTION not in self.instruction:
            raise ValueError(f"`instruction` must hold {QUESTION}: got {self.instruction!r}")
        if taken := sorted({"size", "seed"} & self.config.keys()):
            raise ValueError(f"`config` must not hold {', '.join(taken)}: give it beside `task`")

    def __str__(self) -> str:
        """Format as the task and its part for errors."""
        return f"reasoning_gym {self.task} ({self.part})"

    def includes(self, question: str) -> bool:
        """Return True if a question is of this part."""
        digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
        held_out = int.from_bytes(digest, "big") < self.share * 2**64
        return self.part == "all" or held_out == (self.part == "val")


def read_reasoning_gym(data: ReasoningGymRows) -> list[TableRecord]:
    """Make the rows in order.

    Raises:
        ImportError: `reasoning-gym` is not installed.
        ValueError: the task or its settings are wrong or unfit for training, or no row is left.
    """
    distinct: dict[str, dict[str, Any]] = {}
    for entry in _entries(data):
        distinct.setdefault(entry["question"], entry)
    rows = [_row(data, entry) for question, entry in distinct.items() if data.includes(question)]
    if not rows:
        raise ValueError(f"{data}: none of the {len(distinct)} questions is of this part: raise `size` or `share`")
    return table_records(rows, str(data))


def _row(data: ReasoningGymRows, entry: dict[str, Any]) -> dict[str, Any]:
    graded_by = json.dumps({"task": data.task, "config": data.config, "entry": entry}, sort_keys=True)
    prompt = data.instruction.replace(QUESTION, entry["question"])
    return {"prompt": prompt, "answer": entry["answer"], "reasoning_gym": graded_by}


def _entries(data: ReasoningGymRows) -> list[dict[str, Any]]:
    if find_spec("reasoning_gym") is None:
        raise ImportError(f"{data} needs reasoning-gym: pip install 'lightning-rlhf[rewards]', or reasoning-gym alone")
    request = {name: value for name, value in asdict(data).items() if name in ("task", "config", "size", "seed")}
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode != 0:
        raise ValueError(f"{data} can't be made: {done.stderr.strip().splitlines()[-1:]}")
    reply = json.loads(done.stdout.splitlines()[-1])
    if "problem" in reply:
        raise ValueError(f"{data}: {reply['problem']}")
    return reply["rows"]
