"""On a GPU, alone or shared by two processes: what one process on the CPU trains. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from agreement import assert_same_folder, assert_same_numbers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HOST, VISIBLE, ABREAST = "gpu_program.py", True, 6
STAGES = ["sft", "reward", "ppo", "gae", "lora"]
EXACT = ["gpu", "gpu_ddp", "gpu_fsdp2", "gpu_ddp_nodes"]
ROUNDED = ["gpu_fsdp1", "gpu_zero2", "gpu_zero3"]
NAMES = ",".join([*STAGES, "resumed", "grouped"])
SHORT = "sft,reward,ppo,lora,resumed"
JOBS = [
    f"one:1:{NAMES}:300",
    f"gpu:1:{NAMES},compiled:300",
    f"gpu_ddp:1:{NAMES}:300",
    f"gpu_fsdp2:1:{NAMES}:300",
    f"gpu_ddp_nodes:2:{NAMES}:300",
    f"one32:1:{SHORT}:300",
    "gpu_low:1:start,single,mixed,true,half,scaled:300",
    "gpu_low_fsdp2:1:mixed,true:300",
    "gpu_fsdp1:1:sft,reward:300",
    *(f"{strategy}:1:{SHORT}:300" for strategy in ROUNDED[1:] if find_spec("deepspeed")),
]


def furthest(one: dict, two: dict) -> float:
    """Largest difference of a weight."""
    return float((one["weights"].double() - two["weights"].double()).abs().max())


@pytest.fixture(scope="module")
def rounded(outcome) -> Callable[[str, str], tuple[dict, dict]]:
    """What came out of the CPU in float32, and of a strategy."""

    def found(name: str, strategy: str) -> tuple[dict, dict]:
        if "zero" in strategy:
            pytest.importorskip("deepspeed")
        return outcome(name, "one32"), outcome(name, strategy)

    return found


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("strategy", EXACT)
def test_gpu_trains_what_a_cpu_trains(outcome, strategy, name) -> None:
    """In float64, to the last logged number and evaluation: responses are drawn by the same random numbers."""
    one, gpu = outcome(name, "one"), outcome(name, strategy)
    assert furthest(one, gpu) < 1e-9
    assert len(one["steps"]) == len(gpu["steps"]) >= 3
    for a, b in zip([*one["steps"], one["eval"]], [*gpu["steps"], gpu["eval"]], strict=True):
        assert_same_numbers({k: a[k] for k in a if k[:5] != "eval/"}, {k: b[k] for k in b if k[:5] != "eval/"})


@pytest.mark.parametrize("strategy", EXACT)
def test_gpu_trains_groups_as_a_cpu(outcome, strategy) -> None:
    one, gpu = outcome("grouped", "one"), outcome("grouped", strategy)
    assert one.keys() == gpu.keys()
    for method in one:
        assert furthest(one[method], gpu[method]) < 1e-9, method


@pytest.mark.parametrize("strategy", EXACT)
def test_gpu_resumes_as_if_it_had_not_stopped(outcome, strategy) -> None:
    one, gpu = outcome("resumed", "one"), outcome("resumed", strategy)
    assert furthest(one["resumed"], gpu["resumed"]) < 1e-9
    assert furthest(gpu["whole"], gpu["resumed"]) < 1e-12  # sums on a GPU may change their order
    assert (gpu["whole"]["kl"], gpu["whole"]["n"]) == pytest.approx((gpu["resumed"]["kl"], gpu["resumed"]["n"]))


@pytest.mark.parametrize("name", SHORT.split(",")[:-1])
@pytest.mark.parametrize("strategy", ROUNDED)
def test_gpu_trains_what_a_cpu_trains_in_float32(rounded, strategy, name) -> None:
    if strategy == "gpu_fsdp1" and name not in ("sft", "reward"):
        pytest.skip("FSDP1 trains no policy")
    one, gpu = rounded(name, strategy)
    assert furthest(one, gpu) < 1e-4
    for a, b in zip([*one["steps"], one["eval"]], [*gpu["steps"], gpu["eval"]], strict=True):
        assert_same_numbers(a, b, rel=1e-4, near_0=1e-4)


@pytest.mark.parametrize("strategy", ROUNDED[1:])
def test_gpu_resumes_an_engine(rounded, strategy) -> None:
    _, gpu = rounded("resumed", strategy)
    assert furthest(gpu["whole"], gpu["resumed"]) < 1e-6
    assert furthest(gpu["first"], gpu["resumed"]) > 1e-3


@pytest.mark.parametrize("strategy", ["gpu", "gpu_fsdp2"])
@pytest.mark.parametrize("name", ["sft", "reward", "lora"])
def test_gpu_exports_the_folder_of_a_cpu(outcome, folder, strategy, name) -> None:
    outcome(name, "one"), outcome(name, strategy)
    assert_same_folder(folder / f"{name}-one", folder / f"{name}-{strategy}", atol=1e-9)


@pytest.mark.parametrize(
    ("name", "strategy", "dtype"),
    [
        ("mixed", "gpu_low", torch.float32),
        ("true", "gpu_low", torch.bfloat16),
        ("half", "gpu_low", torch.float32),
        ("mixed", "gpu_low_fsdp2", torch.float32),
        ("true", "gpu_low_fsdp2", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_gpu_in_low_precision_stays_near_float32(outcome, folder, name, strategy, dtype, stage) -> None:
    """What rounding moves is small beside what training moves; losses agree to a few of bfloat16's steps."""
    exact, low = outcome("single", "gpu_low")[stage], outcome(name, strategy)[stage]
    assert low["weights"].dtype == dtype
    start = outcome("start", "gpu_low")[stage]
    moved = float((exact["weights"] - start).norm())
    assert 0.0 < float((exact["weights"] - low["weights"].float()).norm()) < 0.15 * moved
    for a, b in zip(exact["steps"], low["steps"], strict=True):
        losses = {key for key in a if "loss" in key}
        assert {k: b[k] for k in losses} == pytest.approx({k: a[k] for k in losses}, rel=2**-5, abs=2**-5)


def test_gpu_compiles_networks(outcome) -> None:
    plain, compiled = (outcome("compiled", "gpu")[name] for name in ("plain", "compiled"))
    assert furthest(plain, compiled) < 1e-9


def test_gpu_in_half_precision_leaves_out_what_overflows(outcome) -> None:
    """And goes on: the norm of a step that is left out is not finite, those of later ones are."""
    steps = outcome("scaled", "gpu_low")["steps"]
    losses = [step["train/loss"] for step in steps]
    assert losses[-1] < losses[0]
