"""What a command of the command line writes that ends the program."""

from __future__ import annotations

import pytest

from lightning_rlhf.cli import main


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that must end with status 0 writes."""
    return _written(capsys, words, status=0).out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that must end with status 2 says."""
    return _written(capsys, words, status=2).err


def _written(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], *, status: int) -> pytest.CaptureResult[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    written = capsys.readouterr()
    assert stopped.value.code == status, written.err
    return written
