"""What a strategy cannot train is refused before a network is built, in a sentence that says what to take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_rlhf import ModelSource, PPOModule, RewardModule, SFTModule, UpdateSchedule
from lightning_rlhf.callbacks import EMA, RollBack
from lightning_rlhf.distributed.strategies import check_rl_strategy, shard_networks


@pytest.fixture
def under(make_folder, token_reward):
    """A module whose trainer has a strategy; nothing is built."""

    def make(kind: type, strategy: Any, **options: Any) -> Any:
        source = ModelSource(path=make_folder(scorer=kind is RewardModule))
        module = kind(source, token_reward(), **options) if kind is PPOModule else kind(source)
        module._trainer = SimpleNamespace(strategy=strategy, callbacks=[])
        return module

    return make


def deepspeed(stage: int) -> DeepSpeedStrategy:
    """The strategy as far as it is asked, which does not need the package."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)
    strategy.config = {"zero_optimization": {"stage": stage}}
    return strategy


def test_ppo_refuses_fsdp1_and_the_other_stages_take_it(under) -> None:
    with pytest.raises(ValueError, match=r"PPO does not train under FSDPStrategy.*fsdp2\.yaml"):
        under(PPOModule, FSDPStrategy()).configure_model()
    under(SFTModule, FSDPStrategy()).configure_model()


@pytest.mark.parametrize(("norm", "handed"), [(0.5, 0.5), (None, 0.0)])
def test_deepspeed_is_handed_the_clipping(under, norm, handed) -> None:
    module = under(PPOModule, deepspeed(2), updates=UpdateSchedule(max_grad_norm=norm))
    module.configure_model()
    assert module._trainer.strategy.config["gradient_clipping"] == handed


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_are_fetched_ahead_of_no_step_where_they_are_shards(under, stage) -> None:
    """Stage 3 fetches in the order of the step before; no two rollouts have one."""
    module = under(PPOModule, deepspeed(stage))
    check_rl_strategy(module, compiles=False, max_grad_norm=1.0)
    asked = module._trainer.strategy.config["zero_optimization"].get("stage3_prefetch_bucket_size")
    assert asked == {2: None, 3: 0}[stage]


def test_average_of_weights_sharded_by_zero_is_refused(under) -> None:
    module = under(PPOModule, deepspeed(2))
    module.configure_model()
    for weight in module.policy.parameters():
        weight.ds_id = 0
    with pytest.raises(ValueError, match=r"ZeRO stage 3 shards: take stage 2, or .*fsdp2\.yaml"):
        EMA().on_fit_start(SimpleNamespace(optimizers=[]), module)


def test_rolling_back_is_refused_under_deepspeed(under) -> None:
    with pytest.raises(ValueError, match="RollBack cannot return to older weights under DeepSpeed"):
        RollBack().begin(SimpleNamespace(strategy=deepspeed(2)), under(PPOModule, deepspeed(2)))


class Mesh:
    """A device mesh as far as it is asked."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes

    def __getitem__(self, name: str) -> Mesh:
        return Mesh(**{name: self.sizes[name]})

    def size(self) -> int:
        total = 1
        for size in self.sizes.values():
            total *= size
        return total


def test_tensor_parallelism_is_refused_with_the_sizes_to_set(under) -> None:
    module = under(SFTModule, ModelParallelStrategy())
    module._device_mesh = Mesh(data_parallel=2, tensor_parallel=4)
    with pytest.raises(ValueError, match="over 4 devices.*data_parallel_size to 8"):
        shard_networks(module, [])


def test_compiling_is_refused_under_zero_stage_3(under) -> None:
    with pytest.raises(ValueError, match="`compile` was not tried under DeepSpeedStrategy"):
        check_rl_strategy(under(PPOModule, deepspeed(3), compile=True), compiles=True, max_grad_norm=1.0)


def test_compiling_is_refused_under_fsdp2(under) -> None:
    module = under(PPOModule, ModelParallelStrategy(), compile=True)
    module._device_mesh = Mesh(data_parallel=2, tensor_parallel=1)
    with pytest.raises(ValueError, match="`compile` was not tried under ModelParallelStrategy"):
        module.configure_model()
