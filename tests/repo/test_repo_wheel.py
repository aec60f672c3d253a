"""The built wheel in an empty folder, without the clone: configs, a run, its report, and the README's GRPO."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONSOLE = "from lightning_rlhf.cli import console; console()"
pytestmark = pytest.mark.slow
Command = Callable[..., str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contents of the wheel, as an installer lays them out."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lightning_rlhf", source / "lightning_rlhf", ignore=left_out)
    wheels = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def command(site: Path, tmp_path: Path) -> Command:
    """A command of the console script in an empty folder; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}

    def run(*words: str, program: str = CONSOLE) -> str:
        words = (sys.executable, "-c", program, *words)
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_package_is_that_of_the_wheel(command: Command, site: Path) -> None:
    assert command(program="import lightning_rlhf; print(lightning_rlhf.__file__)").startswith(str(site))


def test_configs_are_listed_printed_and_run_again(command: Command, tiny: Any, tmp_path: Path) -> None:
    assert "grpo" in command("configs")
    (tmp_path / "mine.yaml").write_text(command("configs", "grpo"), encoding="utf-8")
    files = [
        f"--model.policy={tiny.policy}",
        f"--model.reward.path={tiny.reward}",
        f"--data.train={tiny.file('prompts')}",
    ]
    printed = command("fit", "--config", "mine.yaml", *files, "--print_config")
    assert "class_path: lightning_rlhf.GRPO" in printed


def test_run_and_report(command: Command, tiny: Any, tmp_path: Path) -> None:
    files = [f"--data.train={tiny.file('prompts')}", f"--data.val={tiny.file('held_out')}"]
    models = [f"--model.policy={tiny.policy}", f"--model.reward.path={tiny.reward}"]
    small = ["--model.generation.max_new_tokens=4", "--data.batch_size=4", "--trainer.limit_train_batches=2"]
    small += ["--trainer.max_epochs=1", "--trainer.precision=32-true", "--trainer.accelerator=cpu"]
    shown = command("fit", "--config", "ppo", *models, *files, *small)
    assert shown.splitlines()[-1] == "report:     lightning-rlhf report runs/ppo"
    command(*shown.splitlines()[-1].split()[2:])
    assert (tmp_path / "runs/ppo/report/report.html").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_grpo_of_the_readme(command: Command, tiny: Any, tmp_path: Path) -> None:
    """Seven lines beside the reward: two imports, the module, the trainer, the folder."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "GRPO" in text]
    statements = [line for line in block.splitlines() if line and not line.startswith(("def ", "    "))]
    assert len(statements) <= 7
    shutil.copy(tiny.file("prompts"), tmp_path / "prompts.jsonl")
    short = "__import__('lightning_rlhf').SamplingParams(max_new_tokens=4)"
    program = block.replace('"MODEL"', f"{tiny.policy!r}, generation={short}")
    command(program=program)
    assert (tmp_path / "runs/brief/model.safetensors").exists()
