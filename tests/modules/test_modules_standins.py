"""Strategies that ask for a GPU, on stand-ins for a CPU: two processes train what one trains, in float32."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from agreement import assert_same_folder, assert_same_numbers

pytestmark = pytest.mark.slow
LAYERS = 1  # ZeRO-3 takes a millisecond for each module of each pass
TRAINED = ["sft", "reward", "ppo", "lora"]
ZERO = ["zero2", "zero3"]
NAMES = ",".join([*TRAINED, "resumed", "validated", "scarce", "scarce_ppo", "poisoned"])
JOBS = [
    f"one32:1:{NAMES}:60",
    "fsdp1:2:sft,reward:60",
    *(f"{strategy}:2:{NAMES}:120" for strategy in ZERO if find_spec("deepspeed")),
]


@pytest.fixture(scope="module")
def outcomes(outcome) -> Callable[[str, str], tuple[dict, dict]]:
    """What came out of one process and of two, by name of the run and strategy of the two."""

    def found(name: str, strategy: str) -> tuple[dict, dict]:
        if strategy in ZERO:
            pytest.importorskip("deepspeed")
        return outcome(name, "one32"), outcome(name, strategy)

    return found


def assert_trained_alike(one: dict, two: dict) -> None:
    """Every step's numbers and the evaluation: means of numbers of order 1, which may cancel."""
    assert len(one["steps"]) == len(two["steps"]) >= 3
    for a, b in zip([*one["steps"], one["eval"]], [*two["steps"], two["eval"]], strict=True):
        assert_same_numbers(a, b, rel=1e-5, near_0=1e-5)


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_fsdp1_trains_as_one_process(outcomes, name):
    one, two = outcomes(name, "fsdp1")
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-5
    assert_trained_alike(one, two)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_trains_as_one_process(outcomes, strategy, name):
    """Adapters, two networks, PTX, ragged microbatches, both adaptations, k samples, clipping; the norm before it."""
    one, two = outcomes(name, strategy)
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-5
    assert_trained_alike(one, two)


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_trains_a_value_network_as_one_process(outcomes, strategy):
    """One backward a step; the losses of both networks, and the norm over them."""
    one, two = (found["whole"] for found in outcomes("resumed", strategy))
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-5
    assert {"loss/value_avg", "policy/grad_norm"} <= one["steps"][0].keys()
    assert_trained_alike(one, two)


def test_fsdp1_finds_the_bias_of_one_process(outcomes):
    one, two = outcomes("reward", "fsdp1")
    assert one["bias"] == pytest.approx(two["bias"], abs=1e-5)
    assert abs(one["bias"]) > 1e-3


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_clips(outcomes, strategy):
    """Or equal weights above would say nothing of the norm that the engine is handed."""
    one, _ = outcomes("ppo", strategy)
    assert max(step["policy/grad_norm"] for step in one["steps"]) > 1.0


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_adapts_and_finds_the_bias_as_one_process(outcomes, strategy):
    one, two = outcomes("ppo", strategy)
    assert (one["n"], one["b"], one["kl"]) == pytest.approx((two["n"], two["b"], two["kl"]), rel=1e-6)
    one, two = outcomes("reward", strategy)
    assert one["bias"] == pytest.approx(two["bias"], abs=1e-5)
    assert abs(one["bias"]) > 1e-3


@pytest.mark.parametrize("name", ["sft", "reward", "lora"])
@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_exports_the_folder_of_one_process(outcomes, folder, strategy, name):
    outcomes(name, strategy)
    assert_same_folder(folder / f"{name}-one32", folder / f"{name}-{strategy}", atol=1e-5)


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_resumes_as_if_it_had_not_stopped(outcomes, strategy):
    one, two = outcomes("resumed", strategy)
    assert torch.equal(two["whole"]["weights"], two["resumed"]["weights"])
    assert (two["whole"]["kl"], two["whole"]["n"]) == (two["resumed"]["kl"], two["resumed"]["n"])
    assert float((one["resumed"]["weights"] - two["resumed"]["weights"]).abs().max()) < 1e-5
    assert float((two["first"]["weights"] - two["resumed"]["weights"]).abs().max()) > 1e-3


def test_average_under_zero2_is_that_of_one_process(outcomes):
    one, two = outcomes("resumed", "zero2")
    averages = [found[name]["average"] for found in (one, two) for name in ("whole", "resumed")]
    assert averages[0]
    for average in averages[1:]:
        assert average.keys() == averages[0].keys()
        assert all(torch.allclose(average[key], averages[0][key], rtol=0, atol=1e-5) for key in average)


@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeed_validates_by_itself(outcomes, strategy):
    one, two = outcomes("validated", strategy)
    assert one["eval/reward"] != 0
    assert one["bias"] != 0
    assert_same_numbers(one, two, rel=1e-5, near_0=1e-5)


@pytest.mark.parametrize("name", ["scarce", "scarce_ppo"])
@pytest.mark.parametrize("strategy", ZERO)
def test_process_without_a_row_to_evaluate_counts_nowhere_under_deepspeed(outcomes, strategy, name):
    one, two = outcomes(name, strategy)
    assert one["eval"]
    assert_same_numbers(one["eval"], two["eval"], rel=1e-5, near_0=1e-5)
    assert two.get("biases", torch.empty(0)).tolist() == pytest.approx(
        [one["bias"]] * 2 if name == "scarce" else [], abs=1e-5
    )


@pytest.mark.parametrize("strategy", ZERO)
def test_guard_counts_the_steps_that_deepspeed_leaves_out(outcomes, folder, strategy):
    """Which shows nobody its gradients. Three NaNs are one too many; what was kept is of all processes."""
    one, two = outcomes("poisoned", strategy)
    assert one["batches"] == two["batches"]
    assert float((one["weights"] - two["weights"]).abs().max()) < 1e-5
    kept = [sorted(path.suffixes[0] for path in (folder / f"nonfinite-{devices}").iterdir()) for devices in (1, 2)]
    assert kept == [[".rank0"] * 3, [".rank0"] * 3 + [".rank1"] * 3]


def test_zero3_leaves_each_process_half_of_every_network(outcomes):
    """Policy, value network, reward model and reference; ZeRO-2 leaves them whole."""
    for name in ("sft", "lora"):
        one, two = outcomes(name, "zero3")
        assert two["held"] == pytest.approx(one["held"] / 2, rel=0.01)  # a weight of odd size is filled up
        assert outcomes(name, "zero2")[1]["held"] == one["held"]
    one, two = outcomes("resumed", "zero3")
    assert two["whole"]["held"] == pytest.approx(one["whole"]["held"] / 2, rel=0.01)
