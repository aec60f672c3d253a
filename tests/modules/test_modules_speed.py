"""Paths that cost less must give the same: log π_old, precision, kernels, clocks."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from gathered import gathered
from lightning.pytorch.plugins import MixedPrecision

from lightning_rlhf.core import AdaptiveKL, BanditAdvantage, Clip, ConstantSchedule, LeaveOneOut, TokenLevel
from lightning_rlhf.distributed.strategies import most_passes
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource, PolicyModel, ScalarModel
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.modules.networks import set_passes
from lightning_rlhf.rollout import RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs, UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17], [20, 21, 22], [23, 11], [10, 12], [33]]
GROUPED = {"generation": SamplingParams(max_new_tokens=6, samples_per_prompt=2)}
SGD = partial(torch.optim.SGD, lr=0.3)
ENDS = [0, 5, 9, 14, 21, 30]  # so that responses differ in length


@pytest.fixture
def make_ppo(make_lm, token_reward):
    def make(kind: str = "gpt2", **options) -> PPOModule:
        usual = {
            "policy": make_lm(kind, end=ENDS).double(),
            "reward": token_reward(),
            "generation": SamplingParams(max_new_tokens=6),
            "shaping": (),
            "optimizer": SGD,
            "schedule": ConstantSchedule(),
        }
        return PPOModule(**gathered(**(usual | options)))

    return make


@pytest.fixture
def weights(make_trainer, as_loader, left_padded, recorder):
    """The policy's weights after two rollouts, and how often its forward ran."""

    def run(module, **options):
        passes = []
        module.configure_model()
        module.policy.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        make_trainer(callbacks=[recorder], **options).fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * 2))
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()]), passes

    return run


@pytest.mark.parametrize("options", [{}, GROUPED, {"level": TokenLevel()}], ids=["bandit", "groups", "tokens"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sources_of_old_logprobs_train_alike_and_cost_differently(make_ppo, weights, kind, options):
    (recomputed, two), (captured, one), (live, also_one) = (
        weights(make_ppo(kind, old_logprobs=old, optimizer=SGD, **options))
        for old in (RecomputedLogprobs(), SamplerLogprobs(), UpdateLogprobs())
    )
    assert torch.allclose(captured, recomputed, rtol=0, atol=1e-6)  # RMSNorm is float32; 1e-13 on GPT-2
    assert torch.allclose(live, recomputed, rtol=0, atol=1e-12)
    assert two == [False, True] * 2
    assert one == also_one == [True] * 2


def test_another_ratio_would_show(make_ppo, weights):
    """Negative control: an old log-prob that is off moves the weights."""

    class Off(SamplerLogprobs):
        def __call__(self, rollout, measure, whole):
            found = super().__call__(rollout, measure, whole)
            object.__setattr__(found, "logprobs", found.logprobs - 0.05 * found.response_mask)
            return found

    one, _ = weights(make_ppo(old_logprobs=SamplerLogprobs(), optimizer=SGD))
    other, _ = weights(make_ppo(old_logprobs=Off(), optimizer=SGD))
    assert float((one - other).abs().max()) > 1e-4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "updates", [UpdateSchedule(minibatch=4, microbatch=3), UpdateSchedule(minibatch=4, microbatch_tokens=30)]
)
def test_first_minibatch_has_ratio_one_in_low_precision(make_ppo, make_lm, weights, precision, updates):
    """RecomputedLogprobs in the very pieces that the updates will use: bfloat16 rounds differently in other company."""
    ratios = []

    class Watched(Clip):
        def __call__(self, log_ratio, advantages):
            ratios.append(float(log_ratio.abs().max()))
            return super().__call__(log_ratio, advantages)

    module = make_ppo("llama", policy=make_lm("llama", end=ENDS), updates=updates, surrogate=Watched(), optimizer=SGD)
    weights(module, precision=precision)
    assert ratios[:2] == [0.0, 0.0]  # four rows in two pieces
    assert max(ratios) > 0.0


RLOO = GROUPED | {"advantage": BanditAdvantage(baseline=LeaveOneOut())}


@pytest.mark.parametrize("options", [RLOO, {"level": TokenLevel()}], ids=["groups", "tokens"])
def test_a_budget_of_tokens_changes_no_weight(make_ppo, weights, options):
    whole, _ = weights(make_ppo(updates=UpdateSchedule(epochs=2), optimizer=SGD, **options))
    pieces, passes = weights(make_ppo(updates=UpdateSchedule(epochs=2, microbatch_tokens=25), optimizer=SGD, **options))
    assert torch.allclose(pieces, whole, rtol=0, atol=1e-10)
    assert sum(passes) > 4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [RLOO, {"level": TokenLevel()}], ids=["groups", "tokens"])
def test_packing_changes_no_weight(make_ppo, weights, kind, options):
    trained = [
        weights(make_ppo(kind, updates=UpdateSchedule(microbatch_tokens=25, packing=packing), optimizer=SGD, **options))
        for packing in (False, True)
    ]
    (padded, passes), (packed, fewer) = trained
    assert torch.allclose(packed, padded, rtol=0, atol=1e-10 if kind == "gpt2" else 1e-6)  # RMSNorm is float32
    assert len(fewer) < len(passes)


def test_all_networks_pack(make_lm, make_scorer):
    policy, reference, value = PolicyModel(make_lm()), PolicyModel(make_lm()), ScalarModel(make_scorer())
    set_passes(policy, None, None, compiled=False, packed=False)
    assert not policy.backbone.packs
    set_passes(policy, reference, value, compiled=False, packed=True)
    assert [model.backbone.packs for model in (policy, reference, value)] == [True] * 3


def test_packing_of_compiled_blocks_is_refused(make_ppo):
    with pytest.raises(ValueError, match="`compile` and `updates.packing` do not go together"):
        make_ppo(updates=UpdateSchedule(packing=True), compile=True)


def test_no_gradient_outlives_its_step(make_ppo, weights):
    """The next rollout is drawn and scored without them."""
    module = make_ppo(updates=UpdateSchedule(minibatch=4))
    weights(module)
    assert all(weight.grad is None for weight in module.parameters())


def test_pass_more_is_counted_and_changes_no_weight(make_ppo, weights, monkeypatch):
    """As where another process of a sharded model needs it: one more in each of two epochs of two rollouts."""
    options = {"updates": UpdateSchedule(epochs=2, microbatch_tokens=25), "optimizer": SGD, "level": TokenLevel()}
    found, passes = weights(make_ppo(**options))
    monkeypatch.setattr("lightning_rlhf.distributed.strategies.most_passes", lambda module, count: count + 1)
    other, more = weights(make_ppo(**options))
    assert sum(more) == sum(passes) + 2 * 2
    assert torch.allclose(found, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("sharded", "most"), [(False, 3), (True, 7)])
def test_passes_are_agreed_on_only_where_a_pass_needs_all(sharded, most):
    def reduce(count, reduce_op):
        assert (int(count), reduce_op) == (3, "max")
        return torch.tensor(7)  # of another process

    trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce), world_size=2)
    mesh = object() if sharded else None
    module = SimpleNamespace(device_mesh=mesh, device="cpu", trainer=trainer, _trainer=trainer)
    assert most_passes(module, 3) == most


def test_choice_is_logged_once(make_ppo, weights, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_rlhf"):
        weights(make_ppo())
    assert caplog.text.count("log π_old is captured while sampling") == 1


def test_captured_in_low_precision_is_refused(make_ppo, weights):
    module = make_ppo(old_logprobs=SamplerLogprobs(), generation=SamplingParams(max_new_tokens=4, dtype="bfloat16"))
    with pytest.raises(ValueError, match=r"old_logprobs`=SamplerLogprobs\(\) cannot be used here"):
        weights(module)


# Optimizer, reference, checkpointing


def adam(params, **options):
    return torch.optim.AdamW(params, lr=0.01, **options)


@pytest.mark.parametrize(("options", "fused"), [({}, True), ({"fused": False}, False), ({"foreach": True}, None)])
def test_adam_is_fused_unless_told_otherwise(make_ppo, weights, options, fused):
    module = make_ppo(optimizer=partial(adam, **options))
    weights(module)
    optimizer = module.trainer.optimizers[0]
    assert {group["fused"] for group in optimizer.param_groups} == {fused}


def test_fused_adam_trains_as_the_plain_one(make_ppo, weights):
    one, _ = weights(make_ppo(optimizer=adam))
    other, _ = weights(make_ppo(optimizer=partial(adam, fused=False)))
    assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_fused_adam_clips_unscaled_gradients_in_fp16(make_ppo, make_lm, weights, recorder):
    """fp16 scales gradients by 2^16; clipping must see them unscaled, and Lightning must not refuse."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    module = make_ppo("llama", optimizer=adam, updates=UpdateSchedule(max_grad_norm=0.5))
    weights(module, precision=None, plugins=[plugin])
    assert module.trainer.optimizers[0].param_groups[0]["fused"]
    assert 0 < recorder.steps[0]["policy/grad_norm"] < 100


def test_reference_in_low_precision_is_near_and_takes_half(make_ppo, make_lm, weights, recorder):
    module = make_ppo("llama", policy=make_lm("llama", end=ENDS), reference_dtype="bfloat16")
    weights(module, precision="bf16-mixed")
    assert {p.dtype for p in module.collector.reference.frozen.parameters()} == {torch.bfloat16}
    assert 0 < abs(recorder.steps[0]["objective/kl"]) < 0.5


def test_reference_dtype_beside_a_source_is_refused(make_ppo, make_folder):
    module = make_ppo(reference=ModelSource(path=make_folder()), reference_dtype="bfloat16")
    with pytest.raises(ValueError, match="set `reference.dtype`"):
        module.configure_model()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checkpointed_activations_change_no_weight_and_keep_the_cache(make_ppo, make_folder, weights, kind):
    found = []
    for checkpointed in (False, True):
        source = ModelSource(path=make_folder(kind, end=3), dtype="float64", gradient_checkpointing=checkpointed)
        module = make_ppo(policy=source, optimizer=SGD)
        blocks = []
        module.configure_model()
        layers = module.policy.backbone.module
        first = layers.h[0] if kind == "gpt2" else layers.layers[0]
        first.mlp.register_forward_pre_hook(lambda *_, blocks=blocks: blocks.append(torch.is_grad_enabled()))
        after, _ = weights(module)
        found.append((after, sum(blocks)))
    (plain, once), (checkpointed, twice) = found
    assert torch.allclose(plain, checkpointed, rtol=0, atol=1e-5)
    assert twice > once  # the blocks really were computed again


@pytest.mark.slow
def test_compiled_networks_train_alike(make_ppo, make_lm, weights):
    """Of one layer: compiling is what takes the time."""
    plain, compiled = (
        weights(make_ppo(policy=make_lm("llama", end=ENDS, num_hidden_layers=1).double(), optimizer=SGD, **options))[0]
        for options in ({}, {"compile": True})
    )
    assert torch.allclose(compiled, plain, rtol=0, atol=1e-5)


# Clock


def test_phases_fill_the_step(make_ppo, make_trainer, as_loader, left_padded):
    module = make_ppo(beta=AdaptiveKL(coef=0.1))
    trainer = make_trainer()
    trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]))
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    phases = {"generate", "reference", "old_logprobs", "reward", "update", "optimizer"}
    assert {f"time/{name}" for name in phases | {"step"}} == {name for name in logged if name.startswith("time/")}
    outer = sum(logged[f"time/{name}"] for name in phases - {"optimizer"})
    assert 0.5 * logged["time/step"] < outer <= logged["time/step"]
    assert logged["time/optimizer"] <= logged["time/update"]
    tokens = logged["objective/response_length"] * len(RAGGED)
    assert logged["throughput/tokens_per_second"] == pytest.approx(tokens / logged["time/step"], rel=1e-5)
    assert 0.05 < logged["memory/peak_gib"] < 64
