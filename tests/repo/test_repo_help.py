"""Help is readable, and a shell can complete the command line."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from stopped import shown

from lightning_rlhf.cli import main
from lightning_rlhf.cli.console import COMMANDS, TOOLS
from lightning_rlhf.cli.suggestions import keys


@pytest.mark.parametrize(("words", "status"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_help_lists_every_command(words: list[str], status: int, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == status
    captured = capsys.readouterr()
    text = captured.err if status else captured.out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    assert set(COMMANDS) == {"fit", "validate", "test", "predict"} | TOOLS.keys()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_is_a_few_screens(command: str, capsys: Any) -> None:
    text = shown(capsys, command, "--help")
    assert len(text.splitlines()) < 190
    assert text.startswith(f"usage: lightning-rlhf {command} [--config NAME_OR_FILE] [--run FOLDER]")
    for part in ("--checkpoint", "--export", "Examples:", "--trainer.max_epochs", "PPOModule"):
        assert part in text
    for foreign in ("TPU cores", "<class", "transformers.", "torch.nn", "--trainer.barebones"):
        assert foreign not in text


def test_help_of_the_module_lists_no_class_of_others(capsys: Any) -> None:
    text = shown(capsys, "fit", "--model.help", "PPOModule")
    assert len(text.splitlines()) < 190
    assert "torch.nn." not in text
    for part in ("--model.algorithm", "eq. 2", "GRPO, DrGRPO", "--model.updates.minibatch", "--model.lr"):
        assert part in text


def test_help_of_a_class_has_its_arguments(capsys: Any) -> None:
    of_method = shown(capsys, "fit", "--model", "PPOModule", "--model.algorithm.help", "GRPO")
    assert "--algorithm.beta" in of_method
    assert "default: 0.04" in of_method
    text = shown(capsys, "fit", "--export.help", "Export")
    assert "--export.merge_adapter" in text


def completed(script: str, *words: str) -> list[str]:
    """What the script answers to the tab key after these words, the last of which is begun."""
    quoted = " ".join(f'"{word}"' for word in ("lightning-rlhf", *words))
    ask = (
        f'{script}\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words)}\n_lightning_rlhf\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    return subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True).stdout.split()


def test_shell_completes_commands_keys_and_configs(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    main(["completion", "bash"])
    script = capsys.readouterr().out
    assert completed(script, "pre") == ["predict"]
    assert completed(script, "fit", "--model.updates.mi") == [
        "--model.updates.minibatch",
        "--model.updates.microbatch",
        "--model.updates.microbatch_tokens",
    ]
    assert completed(script, "fit", "--config", "gr") == ["grpo"]
    assert completed(script, "fit", "--ru") == ["--run"]


def test_keys_are_those_of_the_command_line() -> None:
    assert keys().keys() >= {"model.algorithm.surrogate.epsilon", "data.train", "export.dtype", "trainer.max_epochs"}
    assert not [key for key in keys() if key.split(".")[0] not in ("model", "data", "trainer", *known())]


def known() -> list[str]:
    from lightning_rlhf.cli.standard import STANDARD

    return list(STANDARD)
