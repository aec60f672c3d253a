"""A folder is written whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_rlhf.folders import atomic as room
from lightning_rlhf.folders.atomic import MANIFEST, check_writable, write_folder


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def written(folder: Path, **files: str) -> Path:
    """A folder that was exported before."""
    with write_folder(folder) as target:
        for name, text in files.items():
            (target / name).write_text(text)
    return folder


def test_folder_appears_when_the_block_ends(tmp_path):
    folder = tmp_path / "a" / "b"
    with write_folder(str(folder)) as target:
        (target / "deep").mkdir()
        (target / "deep" / "x").write_text("1")
        assert not folder.exists()
    assert contents(folder) == {"deep/x": "1"}
    assert list(folder.parent.iterdir()) == [folder]


def test_files_can_be_read_by_whom_the_folder_lets_in(tmp_path):
    """safetensors writes for its owner alone, and a server is often somebody else."""
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            with write_folder(tmp_path / "out") as target:
                save_file({"weight": torch.zeros(2)}, target / "model.safetensors")
                (target / "sub").mkdir()
                (target / "sub" / "config.json").write_text("{}")
        finally:
            os.umask(before)
        paths = [path for path in (tmp_path / "out").rglob("*") if path.name != MANIFEST]
        modes = {path.name: path.stat().st_mode & 0o777 for path in paths}
        assert modes == {"model.safetensors": mode, "config.json": mode, "sub": 0o777 & ~umask}


def test_older_folder_is_replaced_as_a_whole(tmp_path):
    folder = written(tmp_path / "f", old="0")
    with write_folder(folder) as target:
        (target / "new").write_text("1")
        assert contents(folder) == {"old": "0"}
    assert contents(folder) == {"new": "1"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_exception_leaves_what_was_there(tmp_path, error, existed):
    folder = tmp_path / "f"
    if existed:
        written(folder, old="0")

    def write() -> None:
        with write_folder(folder) as target:
            (target / "new").write_text("1")
            raise error("disk full")

    with pytest.raises(error, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == ([folder] if existed else [])
    assert not existed or contents(folder) == {"old": "0"}


def test_file_is_not_replaced(tmp_path):
    (tmp_path / "f").write_text("precious")
    with pytest.raises(ValueError, match="a file has that name"), write_folder(tmp_path / "f"):
        raise AssertionError("never entered")
    assert contents(tmp_path) == {"f": "precious"}


def test_relative_folder_is_beside_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with write_folder("runs/f") as target:
        (target / "x").write_text("1")
        monkeypatch.chdir("/")
    assert contents(tmp_path) == {"runs/f/x": "1"}


def test_older_folder_survives_a_failing_rename(tmp_path, monkeypatch):
    folder = written(tmp_path / "f", old="0")
    rename = Path.rename
    monkeypatch.setattr(room, "_exchange", lambda *_: False)

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="stale"), write_folder(folder) as target:
        (target / "new").write_text("1")
    assert contents(tmp_path) == {"f/old": "0"}


@pytest.mark.parametrize("strange", ["notes.txt", "deep/notes.txt", "model.safetensors"])
def test_folder_that_holds_anything_else_is_refused_and_left_alone(tmp_path, strange):
    folder = written(tmp_path / "f", old="0")
    (folder / strange).parent.mkdir(exist_ok=True)
    (folder / strange).write_text("precious")
    for check in (check_writable, lambda folder: write_folder(folder).__enter__()):
        with pytest.raises(ValueError, match=f"not exported there .*{strange}"):
            check(folder)
    assert contents(folder) == {"old": "0", strange: "precious"}


def test_model_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json"):
        check_writable(tmp_path)


def test_file_that_comes_while_writing_is_not_deleted(tmp_path):
    folder = written(tmp_path / "f", old="0")

    def write() -> None:
        with write_folder(folder) as target:
            (target / "new").write_text("1")
            (folder / "notes.txt").write_text("precious")

    with pytest.raises(ValueError, match=r"notes.txt"):
        write()
    assert contents(folder) == {"old": "0", "notes.txt": "precious"}


def test_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for folder in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="working directory"):
            check_writable(folder)


def test_unwritable_place_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't write to .*give a folder that can be written to"):
        check_writable(tmp_path / "file" / "model")
    check_writable(tmp_path / "new" / "model")
    assert not (tmp_path / "new" / "model").exists()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written("~/runs/f", new="1")
    assert contents(tmp_path) == {"runs/f/new": "1"}


def test_folder_is_there_at_every_moment(tmp_path):
    """Or a server that reads it while it is written anew would find none."""
    folder = written(tmp_path / "f", number="0")
    missing, over = [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            try:
                (folder / "number").read_text()
            except OSError as error:
                missing.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    for number in range(200):
        written(folder, number=str(number))
    over.set()
    reader.join()
    assert missing == []
    assert contents(tmp_path) == {"f/number": "199"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    child = os.fork()
    if child == 0:
        with write_folder(tmp_path / "f") as target:
            (target / "half").write_text("0")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".f-precious").mkdir()
    (tmp_path / ".f-precious" / "mine").write_text("1")
    written(tmp_path / "f", new="1")
    assert contents(tmp_path) == {"f/new": "1", ".f-precious/mine": "1"}
