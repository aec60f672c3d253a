"""Four processes, low precision, validation by itself and checkpoints in one file: as one process has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from agreement import assert_same_numbers
from safetensors.torch import load_file

from lightning_rlhf import ModelSource

pytestmark = pytest.mark.slow
HOST = "fsdp2_program.py"
JOBS = [
    "one:1:wide,stopped,alone:60",
    "ddp:4:wide:100",
    "fsdp2:4:wide:100",
    "low:1:single,mixed,true:60",
    "low_fsdp2:2:mixed,true:90",
    "one_file:2:stopped,alone:90",
]


# Four processes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_four_processes_train_what_one_process_trains(outcome, strategy) -> None:
    """PPO-ptx with a value network, a learned reward and ragged pieces, to the last of 11 prompts."""
    one, four = outcome("wide", "one"), outcome("wide", strategy)
    assert (one["n"], len(one["steps"])) == (four["n"], len(four["steps"])) == (32, 2)  # 2 rollouts of 8 · 2 responses
    assert float((one["weights"] - four["weights"]).abs().max()) < 1e-9
    for a, b in zip([*one["steps"], one["eval"]], [*four["steps"], four["eval"]], strict=True):
        assert_same_numbers(a, b)
    assert one["steps"][0]["policy/grad_norm"] > 0.0
    assert {"loss/value_avg", "ptx/loss", "ptx/grad_norm_ratio"} <= one["steps"][0].keys()


def test_sharded_processes_together_read_each_number_once(outcome, folder) -> None:
    """Whole copies under DDP, which read them all four times."""
    (one,) = outcome("wide", "one")["read"].tolist()
    assert outcome("wide", "ddp")["read"].tolist() == [one] * 4
    shares = outcome("wide", "fsdp2")["read"]
    policy = sum(weight.numel() for weight in load_file(folder / "lm" / "model.safetensors").values())
    assert int(shares.sum()) == one + policy  # the reference is no copy of the policy: its shards are read, too
    assert float(shares.max()) < 0.26 * (one + policy)


# Low precision


@pytest.fixture(scope="module")
def start(folder) -> Callable[[str], torch.Tensor]:
    """The weights that a stage begins with, in one row."""

    def of(stage: str) -> torch.Tensor:
        source = ModelSource(path=str(folder / ("scorer" if stage == "reward" else "lm")), dtype="float64")
        network = source.scorer(new_head=False) if stage == "reward" else source.causal_lm()
        return torch.cat([weight.detach().flatten() for weight in network.parameters()])

    return of


@pytest.mark.parametrize(("name", "dtype"), [("mixed", torch.float32), ("true", torch.bfloat16)])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_shards_in_bfloat16_train_as_one_process_does(outcome, start, name, dtype, stage) -> None:
    """Both round, at other places: less lies between them than rounding took the one process away from float32.

    Losses, means of terms of size one, agree to 2^-6, a few of bfloat16's steps of 2^-8.
    """
    exact, one, two = (outcome(*which)[stage] for which in (("single", "low"), (name, "low"), (name, "low_fsdp2")))
    assert one["weights"].dtype == two["weights"].dtype == dtype
    weights = [found["weights"].double() for found in (exact, one, two)]
    rounding = float((weights[0] - weights[1]).norm())
    assert 0.0 < float((weights[1] - weights[2]).norm()) < rounding
    assert rounding < 0.1 * float((weights[1] - start(stage)).norm())  # or it would allow anything
    for a, b in zip([*one["steps"], one["eval"]], [*two["steps"], two["eval"]], strict=True):
        losses = {key for key in a if "loss" in key}
        assert {key: b[key] for key in losses} == pytest.approx({key: a[key] for key in losses}, rel=2**-6, abs=2**-6)
    assert two.get("bias", 0.0) == pytest.approx(one.get("bias", 0.0), rel=2**-6)


# Validation by itself, checkpoints in one file


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_sharded_networks_validate_by_themselves(outcome, stage) -> None:
    one, two = (outcome("alone", strategy)[stage] for strategy in ("one", "one_file"))
    assert one
    assert_same_numbers(one, two)


def test_shards_resume_from_one_file(outcome, folder) -> None:
    one, two = outcome("stopped", "one"), outcome("stopped", "one_file")
    assert (folder / "one_file.ckpt").is_file()
    assert torch.equal(two["whole"]["weights"], two["resumed"]["weights"])
    assert two["whole"]["kl"] == two["resumed"]["kl"]
    assert float((one["resumed"]["weights"] - two["resumed"]["weights"]).abs().max()) < 1e-9
    assert float((two["first"]["weights"] - two["resumed"]["weights"]).abs().max()) > 1e-3
