"""Run folders whose numbers are known by heart."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import Rows, sample, write_csv, write_jsonl


@pytest.fixture
def rl_run(tmp_path: Path) -> Callable[..., Path]:
    """A run of eight rollouts on the curve R(d) = d·(2 − 0.5·log d) at KL = 0, 1, 4, 9, …"""

    def make(name: str = "policy", samples: Rows | None = None) -> Path:
        folder = tmp_path / "runs" / name
        rows = []
        for i in range(8):
            reward = i * (2 - 0.5 * math.log(i)) if i else 0.0
            rows.append({"step": i, "objective/scores": reward, "objective/kl": i * i, "policy/clipfrac_avg": 0.1 * i})
        write_csv(folder / "version_0" / "metrics.csv", rows)
        before = [sample(0, i, float(i), f"before {i}") for i in range(4)]
        after = [sample(8, i, i + 1.0 - 2 * (i == 3), f"after {i}", ended=i != 2) for i in range(4)]
        write_jsonl(folder / "samples.jsonl", [*before, *after] if samples is None else samples)
        (folder / "version_0" / "config.yaml").write_text(
            f"model: {{class_path: PPOModule, init_args: {{kl: {name}}}}}\n"
        )
        return folder

    return make


@pytest.fixture
def reward_run(tmp_path: Path) -> Path:
    """A reward model with ten pairs in each of two bins of confidence."""
    row = {"step": 3, "eval/accuracy": 0.75, "eval/loss": 0.5, "eval/calibration_error": 0.05}
    row |= {
        "eval/accuracy_confidence_50_60": 0.5,
        "eval/mean_confidence_50_60": 0.55,
        "eval/pairs_confidence_50_60": 10,
    }
    row |= {"eval/accuracy_confidence_90_100": 1.0, "eval/mean_confidence_90_100": 0.95}
    row |= {"eval/pairs_confidence_90_100": 10, "eval/accuracy_longer": 0.8, "eval/pairs_longer": 5}
    write_csv(tmp_path / "runs" / "reward" / "version_0" / "metrics.csv", [row])
    return tmp_path / "runs" / "reward"
