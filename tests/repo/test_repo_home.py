"""`~` in a path is the home directory, whatever reads or writes there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_rlhf.callbacks import NonFiniteGuard, PredictionWriter, Report, RolloutLog, RunCheckpoint, SampleLog
from lightning_rlhf.callbacks.checked_io import CheckedIO
from lightning_rlhf.cli.rescore import main as rescore
from lightning_rlhf.data.sources import read_records, stream_records
from lightning_rlhf.models import ModelSource
from lightning_rlhf.models.checkpoint import has_file, read_checkpoint
from lightning_rlhf.report import command as report
from lightning_rlhf.rewards import LearnedReward
from lightning_rlhf.text import load_tokenizer

CHECKPOINT = {"state_dict": {}, "pytorch-lightning_version": "2.5.0"}
TEXT = {"prompt": "a", "response": "b", "tokens": [11], "length": 1, "ended": True, "row": {}}
NUMBERS = dict.fromkeys(("raw_score", "score", "kl", "entropy", "advantage"), 1.0)
LINE = {"iteration": 0, "episode": 0} | TEXT | NUMBERS


@pytest.fixture
def home(tmp_path, monkeypatch, make_folder) -> Path:
    """With a model, a reward model, data, a rollout log and a checkpoint; the working directory is another."""
    folder, work = tmp_path / "home", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    shutil.move(make_folder(), folder / "policy")
    shutil.move(make_folder(scorer=True), folder / "reward")
    torch.save(CHECKPOINT, folder / "last.ckpt")
    (folder / "run").mkdir()
    for path in (folder / "rows.jsonl", folder / "run" / "rollouts.jsonl"):
        path.write_text(json.dumps(LINE) + "\n")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(work)
    return folder


READS = {
    "data": lambda: read_records("~/rows.jsonl")[0].row,
    "pattern": lambda: read_records(["~/r*.jsonl"])[0].row,
    "stream": lambda: next(stream_records("~/rows.jsonl")).row,
    "model": lambda: ModelSource(path="~/policy").causal_lm(),
    "identity": lambda: ModelSource(path="~/policy").identity()["folder"],
    "tokenizer": lambda: load_tokenizer("~/policy"),
    "reward": lambda: LearnedReward("~/reward").prepare(load_tokenizer("~/policy")) or True,
    "checkpoint": lambda: has_file("~/last.ckpt") and read_checkpoint("~/last.ckpt"),
    "resume": lambda: CheckedIO().load_checkpoint("~/last.ckpt"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_home_is_read(home, read):
    assert read()


def begin(callback):
    process = SimpleNamespace(broadcast=lambda problem: problem)
    trainer = SimpleNamespace(default_root_dir=".", fast_dev_run=False, is_global_zero=True, strategy=process)
    callback.file.begin(trainer, before=0)
    callback.file.end()
    return callback.file.path


def place(callback, stage: str = "fit"):
    callback.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), LightningModule(), stage)
    return callback.place


def run_report(output: list[str]) -> Path:
    report.main(["~/run", *output])
    return Path.home() / ("page" if output else "run/report") / "report.html"


def run_rescore() -> Path:
    reward = ["--reward=~/reward", "--tokenizer=~/policy"]
    rescore(["~/run/rollouts.jsonl", *reward, "--output=~/new/out.jsonl"])
    return Path.home() / "new/out.jsonl"


WRITES = {
    "RolloutLog": (lambda: begin(RolloutLog("~/out")), "out/rollouts.jsonl"),
    "SampleLog": (lambda: begin(SampleLog("~/out")), "out/samples.jsonl"),
    "RunCheckpoint": (lambda: RunCheckpoint("~/out").dirpath, "out"),
    "NonFiniteGuard": (lambda: place(NonFiniteGuard(folder="~/out")), "out"),
    "PredictionWriter": (lambda: place(PredictionWriter("~/out.jsonl"), "predict"), "out.jsonl"),
    "Report": (lambda: place(Report("~/run")), "run/report"),
    "Report.output": (lambda: place(Report("~/run", "~/page")), "page"),
    "report": (lambda: run_report([]), "run/report/report.html"),
    "report --output": (lambda: run_report(["--output=~/page"]), "page/report.html"),
    "rescore": (run_rescore, "new/out.jsonl"),
}


@pytest.mark.parametrize(("write", "place"), WRITES.values(), ids=WRITES)
def test_home_is_written_to(home, write, place):
    found = Path(write())
    assert found == home / place
    assert not Path("~").exists()
