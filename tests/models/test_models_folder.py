"""A folder is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_rlhf.models.folder import write_folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


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
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
        assert modes == {"model.safetensors": mode, "config.json": mode, "sub": 0o777 & ~umask}


def test_older_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "old").write_text("0")
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
        folder.mkdir()
        (folder / "old").write_text("0")

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
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "old").write_text("0")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="stale"), write_folder(folder) as target:
        (target / "new").write_text("1")
    assert contents(tmp_path) == {"f/old": "0"}
