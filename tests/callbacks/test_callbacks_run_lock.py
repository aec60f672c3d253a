"""Two runs never write to one folder, and checkpoints of any kind follow one another there."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_rlhf.callbacks import RunCheckpoint, checked_io
from lightning_rlhf.callbacks.run_lock import RunLock
from lightning_rlhf.callbacks.torn import discard, rename
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.modules import SFTModule

TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0]]


@contextmanager
def another_process(path: Path):
    """One that holds the lock until it is killed; its number."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        lock = RunLock()
        lock.take(path)
        os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture
def fit(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    def run(ckpt_path=None, *, epochs=1) -> SFTModule:
        adam = partial(torch.optim.Adam, lr=0.01)
        module = SFTModule(make_lm().double(), optimizer=adam, schedule=ConstantSchedule())
        saver = RunCheckpoint(str(tmp_path / "kept"))
        trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(module, as_loader([right_padded(TEXTS)] * 2), ckpt_path=ckpt_path)
        return module

    return run


def test_second_run_is_refused_and_names_the_first(fit, tmp_path):
    fit()
    before = (tmp_path / "kept" / "last.ckpt").read_bytes()
    with another_process(tmp_path / "kept" / ".lock") as holder:
        for ckpt_path in (None, "last"):
            with pytest.raises(
                ValueError, match=rf"`dirpath`: another run writes to .*kept: process {holder} on .*since"
            ):
                fit(ckpt_path, epochs=2)
        assert (tmp_path / "kept" / "last.ckpt").read_bytes() == before
    fit("last", epochs=2)  # a killed process holds nothing


def test_lock_is_gone_after_a_run_and_after_an_error(fit, tmp_path, monkeypatch):
    fit()
    assert not (tmp_path / "kept" / ".lock").exists()
    monkeypatch.setattr(SFTModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit()
    assert not (tmp_path / "kept" / ".lock").exists()


def test_stopped_process_keeps_its_folder(tmp_path):
    with another_process(tmp_path / ".lock") as holder:
        os.kill(holder, signal.SIGSTOP)
        assert f"process {holder}" in RunLock().take(tmp_path / ".lock")


def test_child_of_the_holder_does_not_keep_the_lock(tmp_path):
    """As a data worker that outlives its killed process for some seconds."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        RunLock().take(tmp_path / ".lock")
        worker = os.fork()
        if worker == 0:
            time.sleep(20)
            os._exit(0)
        os.write(told, str(worker).encode())
        time.sleep(60)
    worker = int(os.read(ready, 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock = RunLock()
    try:
        assert lock.take(tmp_path / ".lock") is None
    finally:
        lock.release()
        os.kill(worker, signal.SIGKILL)


def test_folder_that_cannot_be_written_is_refused_before_training(fit, tmp_path):
    (tmp_path / "kept").write_text("a file")
    with pytest.raises(ValueError, match="`dirpath`: can't write to .*give a folder that can be written to"):
        fit()


def write(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        path = path / "inner"
    path.write_text(text)


def read(path: Path) -> str:
    return (path / "inner" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("older", ["file", "folder"])
@pytest.mark.parametrize("newer", ["file", "folder"])
def test_checkpoint_of_one_kind_takes_the_name_of_another(tmp_path, older, newer):
    """One device writes files, FSDP2 folders; the same folder sees both where a strategy changes."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "last-previous.ckpt"
    for number, kind in enumerate([older, newer, newer, older]):
        part = tmp_path / "last.ckpt.part"
        write(part, kind, str(number))
        if last.exists():
            rename(last, previous)
        rename(part, last)
        assert read(last) == str(number)
        assert number == 0 or read(previous) == str(number - 1)
    discard(last)
    discard(previous)
    discard(previous)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_goes_to_its_file_alone(tmp_path, monkeypatch):
    """Nothing of its size is in memory, or where temporary files are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    checkpoint = {"weights": torch.zeros(2**26)}  # 256 MiB
    child = os.fork()  # whose peak of memory begins at what it has
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        checked_io.CheckedIO().save_checkpoint(checkpoint, tmp_path / "deep" / "x.ckpt")
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
        os._exit(0 if more < 2**16 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.ckpt"]
    assert torch.load(tmp_path / "deep" / "x.ckpt")["weights"].shape == (2**26,)
