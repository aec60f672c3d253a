"""Rewards that ask others, on the command line; the key of a judge stands in no file of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_chat import chatting

from lightning_rlhf.cli import main
from lightning_rlhf.rewards import FunctionReward

KEY = "sk-very-secret"
STEP = "--trainer.limit_train_batches=1"


def files_with(word: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


@pytest.mark.parametrize("status", [None, 401], ids=["answers", "refuses"])
def test_key_of_a_judge_stands_in_no_file_of_a_run(ppo, workplace: Path, monkeypatch, capfd, status):
    monkeypatch.setenv("MY_KEY", KEY)
    words = ppo(model__reward__path=None)
    with chatting(lambda message, body: "<score>4</score>") as fake:
        fake.fault = lambda n, body: status
        chat = [f"--model.reward.chat.{x}" for x in (f"url={fake.url}", "model=m", "key_from=MY_KEY", "cache=answers")]
        if status is None:
            cli = main(["fit", *words, "--model.reward=Judge", *chat, STEP])
            assert cli.trainer.global_step > 0
            assert files_with("<score>4", workplace / "answers")
        else:
            with pytest.raises((Exception, SystemExit)) as raised:
                main(["fit", *words, "--model.reward=Judge", *chat, STEP])
            assert KEY not in repr(raised.getrepr(chain=True))
        assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"
    said = "".join(capfd.readouterr())
    assert KEY not in said
    assert files_with("MY_KEY", workplace)  # the config is there
    assert files_with(KEY, workplace) == []


def test_async_function_by_its_path(ppo, workplace, monkeypatch):
    async def brevity(prompts, responses):
        return [-float(len(response)) for response in responses]

    async def one(prompt, response):
        return 1.0

    module = ModuleType("my_project")
    for fn in (brevity, one):
        fn.__module__, fn.__qualname__ = "my_project", fn.__name__
        setattr(module, fn.__name__, fn)
    monkeypatch.setitem(sys.modules, "my_project", module)
    words = ppo(model__reward__path=None)
    cli = main(["fit", *words, "--model.reward=my_project.brevity", "--run=runs/a", STEP])
    assert isinstance(cli.model.reward, FunctionReward)
    assert cli.trainer.global_step > 0
    each = ["--model.reward=PerResponse", "--model.reward.fn=my_project.one", "--model.reward.concurrency=2"]
    assert main(["fit", *words, *each, "--run=runs/b", STEP]).trainer.global_step > 0


@pytest.mark.skipif(os.name != "posix", reason="limits of processes")
def test_program_by_its_command(ppo, workplace):
    Path("grade.py").write_text("import json, sys\nprint(len(json.load(sys.stdin)['response']))\n")
    words = ppo(model__reward__path=None)
    cli = main(["fit", *words, "--model.reward=ProgramReward", "--model.reward.command=[python, grade.py]", STEP])
    assert cli.trainer.global_step > 0
