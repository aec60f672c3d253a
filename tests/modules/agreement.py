"""Whether two runs came out alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def assert_same_numbers(
    one: dict[str, float], two: dict[str, float], *, rel: float = 1e-6, near_0: float = 1e-7
) -> None:
    """Logged numbers, which are float32."""
    assert one.keys() == two.keys()
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=rel, abs=near_0, nan_ok=True), name


def assert_same_folder(one: Path, two: Path, *, atol: float) -> dict[str, torch.Tensor]:
    """Exported files, weights and the bias; the first's weights."""
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()} >= {"model.safetensors"}
    first_bias, second_bias = (
        json.loads((folder / "config.json").read_text()).get("demonstration_bias") for folder in (one, two)
    )
    assert second_bias == pytest.approx(first_bias, abs=max(atol, 1e-6))  # its mean is accumulated in float32
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], rtol=0, atol=atol) for key in first)
    return first
