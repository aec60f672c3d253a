"""Each file in `configs/` parses, survives `--print_config`, and runs."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_rlhf.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES = sorted(CONFIGS.glob("*.yaml"))
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))


def named(path: Path) -> str:
    return path.stem


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_there_are_configs_to_test() -> None:
    assert {"sft", "reward", "ppo", "ppo_ptx", "bandit_klpen", "instructgpt"} <= {path.stem for path in STAGES}
    assert {"ddp", "fsdp"} <= {path.stem for path in STRATEGIES}


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_says_what_it_reproduces_departs_from_and_how_to_run_it(config: Path) -> None:
    opening = header(config)
    for word in ("Reproduces", "Departs", f"Run: lightning-rlhf fit --config configs/{config.name}"):
        assert word in opening


@pytest.mark.parametrize("config", STRATEGIES, ids=named)
def test_strategy_gives_a_command(config: Path) -> None:
    assert "lightning-rlhf fit --config configs/" in header(config)
    assert f"--config configs/strategy/{config.name}" in header(config)


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_keeps_its_values_and_survives_print_config(
    config: Path, tiny: Any, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands in the file is what runs: no value of it is lost under the required arguments."""
    given = [f"--{name}={value}" for name, value in tiny.required(config).items()]
    first = printed(capsys, "--config", str(config), *given)
    assert not list(lost(yaml.safe_load(config.read_text(encoding="utf-8")), yaml.safe_load(first)))
    Path("printed.yaml").write_text(first, encoding="utf-8")
    assert printed(capsys, "--config", "printed.yaml") == first


def lost(written: Any, result: Any, path: str = "") -> Any:
    """Places at which `result` has not what was written; a class may be named by its last word alone."""
    if isinstance(written, dict) and isinstance(result, dict):
        for name, value in written.items():
            yield from lost(value, result.get(name), f"{path}.{name}")
    elif isinstance(written, list) and isinstance(result, list) and len(written) == len(result):
        for i, (one, other) in enumerate(zip(written, result, strict=True)):
            yield from lost(one, other, f"{path}[{i}]")
    else:
        name = result["class_path"] if isinstance(result, dict) and "class_path" in result else result
        if name != written and str(name).rsplit(".", 1)[-1] != written:
            yield f"{path}: {written!r} became {result!r}"


@pytest.mark.parametrize("config", STAGES, ids=named)
def test_stage_runs_two_steps_and_exports(config: Path, tiny: Any, workplace: Path) -> None:
    main(["fit", *tiny.arguments(config)])
    (metrics,) = Path("runs").rglob("metrics.csv")
    with metrics.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert not [value for row in rows for value in row.values() if "nan" in value]
    assert list(Path("runs").rglob("model/model.safetensors"))


def test_stages_feed_each_other(tiny: Any, workplace: Path) -> None:
    """The commands in the headers, one after the other: each finds what the one before it wrote."""
    main(["fit", *tiny.arguments(CONFIGS / "sft.yaml")])
    main(["fit", *tiny.arguments(CONFIGS / "reward.yaml", model__model__path="runs/sft/model")])
    paths = {"model__policy__path": "runs/sft/model", "model__reward__path": "runs/reward/model"}
    cli = main(["fit", *tiny.arguments(CONFIGS / "ppo_ptx.yaml", **paths)])
    assert cli.model.episodes == 8


@pytest.mark.parametrize("strategy", STRATEGIES, ids=named)
def test_strategy_lies_over_a_stage(strategy: Path, tiny: Any, workplace: Path, capsys: Any) -> None:
    text = printed(capsys, *tiny.arguments(CONFIGS / "sft.yaml"), "--config", str(strategy))
    written = yaml.safe_load(strategy.read_text(encoding="utf-8"))
    assert not list(lost(written, yaml.safe_load(text)))
    Path("printed.yaml").write_text(text, encoding="utf-8")
    assert printed(capsys, "--config", "printed.yaml") == text


@pytest.mark.slow
def test_ddp_runs_on_two_processes(ppo: Callable[..., list[str]], workplace: Path) -> None:
    arguments = [*ppo(data__batch_size=2), "--config", str(CONFIGS / "strategy" / "ddp.yaml"), "--trainer.devices=2"]
    command = [sys.executable, "-m", "lightning_rlhf", "fit", *arguments]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with Path("runs/ppo/version_0/metrics.csv").open(encoding="utf-8") as file:
        episodes = [float(row["episode"]) for row in csv.DictReader(file) if row["episode"]]
    assert episodes == [4, 8]  # two rollouts of 2 prompts on each of 2 processes
