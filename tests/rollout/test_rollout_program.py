"""A program as reward: what it gets, its limits, and which failures are whose."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightning_rlhf.rewards import ProgramReward, TimedReward

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits of processes")
HEAD = "import json, os, sys, time\nasked = json.load(sys.stdin)\nresponse = asked['response']\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A reward by the given lines of Python, which have `asked` and `response`."""
    monkeypatch.chdir(tmp_path)

    def build(lines, **options):
        Path("grade.py").write_text(HEAD + lines)
        return ProgramReward(["python", "grade.py"], **options)

    return build


def score(reward, *responses, **columns):
    return reward.score([f"prompt of {response}" for response in responses], list(responses), **columns)


def test_program_gets_prompt_response_and_columns(program):
    reward = program(
        "print('thinking')\n"
        "assert asked == {'prompt': 'prompt of é\\n\"x', 'response': 'é\\n\"x', 'columns': {'answer': [1, None]}}\n"
        "print(len(response) + 0.25, end='\\n\\n')"
    )
    assert score(reward, 'é\n"x', answer=[[1, None]]) == [4.25]


def test_order_is_that_of_the_responses_and_wall_time_not_the_sum(program):
    reward = program("time.sleep(0.5 + 0.2 * (response == '0'))\nprint(response)", concurrency=8)
    start = time.monotonic()
    assert score(reward, *"01234567") == [float(i) for i in range(8)]
    assert time.monotonic() - start < 3.5  # one by one: 4.2 s


def test_no_more_than_concurrency_run_at_once(program, tmp_path):
    reward = program(f"open(r'{tmp_path}/' + response, 'w')\ntime.sleep(0.3)\nprint(time.time() - 0.3)", concurrency=1)
    starts = score(reward, "a", "b", "c")
    assert min(later - earlier for earlier, later in zip(starts, starts[1:], strict=False)) >= 0.29


def test_environment_and_folder_are_its_own(program, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "sesame")
    reward = program(
        "assert sorted(os.environ) == ['HOME', 'LC_ALL', 'OMP_NUM_THREADS', 'PATH', 'TMPDIR'], os.environ\n"
        "assert os.listdir() == [] and os.environ['HOME'] == os.getcwd()\n"
        "open('left', 'w').write('x')\n"
        f"open(r'{tmp_path}/place', 'w').write(os.getcwd())\n"
        "print(1)"
    )
    assert score(reward, "a") == score(reward, "b") == [1.0]
    assert not Path((tmp_path / "place").read_text()).exists()


@pytest.mark.parametrize(
    ("lines", "limits"),
    [
        ("x = bytearray(2**30)", {"memory": 2**29}),
        ("open('x', 'wb').write(bytes(2**21))", {"file_size": 2**20}),
        ("print('x' * 2**21, flush=True)", {"file_size": 2**20}),
        ("print(5); sys.exit(3)", {}),
        ("print('no'); sys.exit()", {}),
        ("print('nan'); sys.exit()", {}),
        ("sys.exit()", {}),
    ],
    ids=["memory", "file", "output", "code", "text", "nan", "silence"],
)
def test_failed_run_scores_failed_and_is_counted(program, make_rollout, toy_tokenizer, lines, limits):
    reward = program(f"if response == 'd':\n    {lines}\nprint(2)", failed=-1.5, **limits)
    reward.prepare(toy_tokenizer)
    scores = reward.scored(make_rollout([[10], [11]], [[13, 0], [14, 0]]), [{"prompt": "a"}, {}])
    assert scores.total.tolist() == [-1.5, 2.0]
    assert scores.parts["failed"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("lines", ["x = bytearray(2**30)", "open('x', 'wb').write(bytes(2**21))", "print('x' * 2**21)"])
def test_same_lines_pass_within_the_limits(program, lines):
    assert score(program(f"{lines}\nprint(2)"), "a") == [2.0]


def test_late_program_is_ended_with_its_children(program, tmp_path):
    reward = program(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open(r'{tmp_path}/child', 'w').write(str(child.pid))\n"
        "child.wait()",
        seconds=1.0,
    )
    start = time.monotonic()
    assert score(reward, "a") == [0.0]
    assert time.monotonic() - start < 10
    assert gone(int((tmp_path / "child").read_text()))


def test_child_that_is_left_behind_is_ended(program, tmp_path):
    reward = program(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        f"open(r'{tmp_path}/child', 'w').write(str(child.pid))\n"
        "print(1)"
    )
    assert score(reward, "a") == [1.0]
    assert gone(int((tmp_path / "child").read_text()))


def gone(process):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_process_that_leaves_its_group_has_a_limit_of_cpu_time(program):
    """Its limits are its own: `RLIMIT_CPU` and the others are set before the program starts."""
    lines = "import resource as r\nprint([*map(r.getrlimit, [r.RLIMIT_CPU, r.RLIMIT_CORE, r.RLIMIT_NPROC])])\n"
    with pytest.raises(RuntimeError, match=r"\[\(4, 4\), \(0, 0\), \(4000, 4000\)\]"):
        score(program(lines, seconds=2.5, processes=4000), "a")


def test_program_that_fails_everywhere_is_told_with_what_it_wrote(program):
    reward = program("import no_such_module")
    said = "python grade.py gave no number for any of 2 responses.*ended with code 1.*No module named 'no_such_module'"
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        score(reward, "a", "b")


@pytest.mark.parametrize("lines", ["time.sleep(60)", "os.kill(os.getpid(), 9)"], ids=["wall", "killed"])
def test_rollout_that_is_late_everywhere_is_no_fault_of_the_program(program, lines):
    assert score(program(lines, seconds=0.5), "a", "b") == [0.0, 0.0]


def test_file_that_is_no_program_is_told(program, tmp_path):
    (tmp_path / "grade").write_text("\x7fELF nonsense")
    (tmp_path / "grade").chmod(0o755)
    with pytest.raises(RuntimeError, match="grade does not start"):
        score(ProgramReward(["./grade"]), "a")


def test_timed_reward_around_it_ends_it(program, make_rollout, toy_tokenizer):
    timed = TimedReward(program("time.sleep(2)\nprint(1)", seconds=3.0), seconds=0.5)
    timed.prepare(toy_tokenizer)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        timed.scored(make_rollout([[10]], [[13, 0]]), [{}])
    assert time.monotonic() - start < 1.8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"command": []}, "must name a program"),
        ({"command": ["no-such-program"]}, "there is no program 'no-such-program'"),
        ({"command": ["python"], "seconds": 0.0}, "`seconds`"),
        ({"command": ["python"], "memory": 0}, "`memory`"),
        ({"command": ["python"], "concurrency": 0}, "`concurrency`"),
        ({"command": ["python"], "failed": float("nan")}, "`failed`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        ProgramReward(**arguments)


def test_identity_has_the_limits_and_not_the_concurrency(program):
    assert program("", concurrency=1).identity() == program("").identity()
    assert program("", seconds=1.0).identity() != program("").identity()


def test_program_is_found_by_its_name():
    assert ProgramReward(["python"])._argv[-1] == os.path.abspath(sys.executable)
