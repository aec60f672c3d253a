"""Shipped configs by name, from a clone and from an installed wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from lightning_rlhf.cli import configs, main

ROOT = Path(__file__).parents[2]


def test_every_config_has_a_name() -> None:
    names = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in ROOT.glob("configs/**/*.yaml")}
    assert configs.shipped().keys() == names
    assert {"grpo", "ppo", "strategy/ddp"} <= names


def test_every_config_is_in_the_wheel() -> None:
    """A link in the package leads to them, and the package's data name them; a copy could come to differ."""
    link = ROOT / "lightning_rlhf" / "configs"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "configs"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["lightning_rlhf"]
    packed = {path.resolve() for pattern in patterns for path in (ROOT / "lightning_rlhf").glob(pattern)}
    assert packed >= {path.resolve() for path in ROOT.glob("configs/**/*.yaml")}


def test_clone_without_links_has_them_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configs, "PLACES", (tmp_path / "nowhere", ROOT / "configs"))
    assert configs.shipped()["grpo"] == ROOT / "configs" / "grpo.yaml"


def test_a_file_of_the_name_wins(workplace: Path) -> None:
    Path("grpo").mkdir()
    assert Path(configs.path_of("grpo")).samefile(ROOT / "configs" / "grpo.yaml")
    Path("grpo").rmdir()
    Path("grpo").write_text("trainer: {}", encoding="utf-8")
    assert configs.path_of("grpo") == "grpo"
    assert configs.path_of("configs/none.yaml") == "configs/none.yaml"  # the parser says that it is not there


def test_unknown_name_gets_the_nearest(workplace: Path, capsys: Any) -> None:
    for arguments in (["--config=grppo"], ["--config", "grppo"]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *arguments])
        assert stopped.value.code == 2
        assert "no shipped config of that name: did you mean grpo" in capsys.readouterr().err


def test_config_by_name_is_the_file(capsys: Any, workplace: Path) -> None:
    required = ["--model.policy.path=nowhere", "--model.reward.path=nowhere", "--data.train=none.jsonl"]
    printed = []
    for config in ("grpo", str(ROOT / "configs" / "grpo.yaml")):
        with pytest.raises(SystemExit):
            main(["fit", "--config", config, "--config=strategy/ddp", *required, "--print_config"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "strategy: ddp" in printed[0]


def test_configs_are_listed_and_printed(capsys: Any) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(configs.shipped())
    assert any(line.startswith("grpo ") and "GRPO: advantages within the responses" in line for line in lines)
    main(["configs", "grpo"])
    assert capsys.readouterr().out == (ROOT / "configs" / "grpo.yaml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["configs", "grpa"])
    assert "did you mean grpo" in capsys.readouterr().err
