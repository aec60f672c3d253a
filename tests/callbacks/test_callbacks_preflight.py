"""Preflight passes a sound run without leaving a trace, and each of its checks finds what it is for."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch import LightningDataModule
from torch import nn

from lightning_rlhf.callbacks import EMA, GradientNorms, Preflight
from lightning_rlhf.callbacks.preflight_memory import memory_estimate, memory_peak, memory_report, memory_warning
from lightning_rlhf.core import GAE, ConstantSchedule, TokenLevel
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.rewards import LearnedReward
from lightning_rlhf.rollout import UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]


@pytest.fixture
def fit(make_lm, make_trainer, as_loader, left_padded, token_reward, toy_tokenizer):
    """Two rollouts; the module."""

    def run(preflight=True, *, lm=None, rows=None, change=lambda module: None, trainer_options=None, **options):
        usual = {
            "generation": SamplingParams(max_new_tokens=4),
            "schedule": ConstantSchedule(),
            "tokenizer": toy_tokenizer,
        }
        usual |= {"reward": token_reward(), "optimizer": partial(torch.optim.Adam, lr=0.01)}
        module = PPOModule((lm or make_lm()).double(), **gathered(**usual | options))
        module.configure_model()
        change(module)
        trainer = make_trainer(callbacks=[Preflight()] if preflight else [], **trainer_options or {})
        trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED, rows=rows)}] * 2))
        return module

    return run


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sound_run_passes_and_is_left_as_it_is(fit, make_lm, kind, caplog):
    caplog.set_level(logging.INFO)
    with_it, without = fit(lm=make_lm(kind)), fit(preflight=False, lm=make_lm(kind))
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "preflight: about" in caplog.text
    assert not [
        record
        for record in caplog.records
        if record.name.startswith("lightning_rlhf.callbacks.preflight") and record.levelno > logging.INFO
    ]


def test_bf16_passes(fit, make_lm):
    fit(lm=make_lm().float(), trainer_options={"precision": "bf16-mixed"})


def test_other_reference_is_meant_where_it_is_named(fit, make_folder):
    fit(reference=ModelSource(path=make_folder(seed=5), dtype="float64"))


def disturb(network: nn.Module) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def test_reference_that_is_not_the_policy_is_found(fit):
    with pytest.raises(ValueError, match="KL of an untrained policy to its reference is not 0") as found:
        fit(change=lambda module: disturb(module.collector.reference.frozen))
    assert "ratio" not in str(found.value)


def test_noise_in_the_network_is_found(fit):
    def noisy(module):
        module.policy.network.transformer.ln_f.register_forward_hook(
            lambda m, i, out: out + 0.1 * torch.randn_like(out)
        )

    with pytest.raises(ValueError, match="the ratio of an untrained policy is not 1.*no dropout"):
        fit(change=noisy)


def test_network_that_reads_padding_is_found(fit):
    def blind(module):
        inner = module.policy.network.transformer

        def forget(m, args, kwargs):
            known = kwargs.get("attention_mask")
            return args, kwargs | ({} if known is None else {"attention_mask": torch.ones_like(known)})

        inner.register_forward_pre_hook(forget, with_kwargs=True)

    with pytest.raises(ValueError, match="three more columns of padding move log-probs"):
        fit(change=blind)


def test_tokenizer_larger_than_the_embeddings_is_found(fit, make_lm):
    with pytest.raises(ValueError, match=r"embeds 30 tokens.*lie beyond.*resize_token_embeddings"):
        fit(lm=make_lm(vocab=30))


@pytest.mark.parametrize("stage", [SFTModule, RewardModule])
def test_tokenizer_is_checked_in_every_stage(stage, make_lm, make_scorer, make_trainer, as_loader, toy_tokenizer):
    module = stage((make_lm if stage is SFTModule else make_scorer)(vocab=30), toy_tokenizer)
    with pytest.raises(ValueError, match="embeds 30 tokens"):
        make_trainer(callbacks=[Preflight()]).fit(module, as_loader([None]))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write the content"),
        ("{{ raise_exception('needs a system message') }}", "fails on a question.*needs a system message"),
    ],
)
def test_broken_template_is_found(fit, make_tokenizer, template, said):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=said):
        fit(tokenizer=tokenizer)


def test_template_that_asks_otherwise_than_it_teaches_is_warned_of(fit, make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    fit(tokenizer=tokenizer)
    assert "asked otherwise than it was taught" in caplog.text


def test_template_that_ends_a_turn_in_words_is_warned_of(fit, make_tokenizer, caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", " z z")
    fit(tokenizer=tokenizer)
    assert "ends a turn with 'z z', which is no special token" in caplog.text


@pytest.mark.parametrize(("end", "said"), [(13, "'d', an ordinary token"), ([0, 99], "no token of the tokenizer")])
def test_end_token_of_the_generation_config_that_is_none_is_warned_of(fit, make_lm, caplog, end, said):
    lm = make_lm()
    lm.generation_config.eos_token_id = end
    fit(lm=lm)
    assert said in caplog.text
    assert "set `eos_token_id` in generation_config.json to [4, 0]" in caplog.text


@pytest.mark.parametrize(("stage", "ends"), [(SFTModule, [4, 0, 1]), (RewardModule, [4, 0])])
def test_end_tokens_are_told_in_every_stage(stage, ends, make_lm, make_scorer, make_trainer, toy_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    module = stage((make_lm if stage is SFTModule else make_scorer)(end=1), toy_tokenizer)
    module.configure_model()
    Preflight().on_train_start(make_trainer(), module)
    named = ", ".join(f"{toy_tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    assert f"a response ends at any of: {named}" in caplog.text
    assert "end" not in "".join(record.message for record in caplog.records if record.levelno > logging.INFO)


def test_sampling_filters_are_warned_of(fit, caplog):
    def filtered(module):
        module.policy.network.generation_config.top_k = 20
        module.policy.network.generation_config.repetition_penalty = 1.2

    fit(change=filtered)
    assert "generation config has top_k=20" in caplog.text
    assert "repetition_penalty=1.2" in caplog.text


@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_demonstrations_far_from_zero_are_found(fit, make_folder, bias):
    def shifted(module):
        module.reward.model.bias = bias

    rows = [{"prompt": "a b", "response": "c"}] * 4
    options = {
        "reward": LearnedReward(make_folder(scorer=True, initializer_range=0.01)),
        "rows": rows,
        "change": shifted,
    }
    if bias:
        with pytest.raises(
            ValueError, match="4 demonstrations score .*train the reward model with `data.demonstrations`"
        ):
            fit(**options)
    else:
        fit(**options)


GIB = 2**30


class Sizes(LightningDataModule):
    """What the estimate reads of a data module."""

    batch_size, max_prompt_tokens, text_tokens, pretrain_ratio = 8, 10, 9, 2.0


@pytest.fixture
def estimate(make_lm, make_trainer, token_reward):
    """Bytes of each part for a random network of 2 layers with 16 hidden units, and its parameters' count."""

    def run(*, callbacks=(), precision="32-true", data=True, checkpointing=False, **options):
        network = make_lm("llama")
        if checkpointing:
            network.gradient_checkpointing_enable()
        options = {"generation": SamplingParams(max_new_tokens=4)} | options
        module = PPOModule(network, token_reward(), **gathered(**options))
        module.configure_model()
        trainer = make_trainer(callbacks=list(callbacks), precision=precision)
        trainer.datamodule = Sizes() if data else None
        parts = memory_estimate(trainer, module)
        return {name: size * GIB for name, size in parts.items()}, sum(p.numel() for p in network.parameters())

    return run


def test_memory_is_counted_by_hand(estimate):
    parts, count = estimate(data=False)
    size = 4 * count
    assert parts == pytest.approx(
        {
            "weights": size,
            "gradients": size,
            "optimizer": 2 * size,
            "frozen networks": size,
            "sampling copy": size,
            "activations": 0,
        }
    )


def test_memory_of_low_precision_and_callbacks_is_counted_by_hand(estimate):
    callbacks = [EMA(), GradientNorms()]
    parts, count = estimate(callbacks=callbacks, precision="bf16-mixed", ptx_coef=1.0, reference_dtype="bfloat16")
    assert parts["frozen networks"] == parts["sampling copy"] == parts["autocast copies"] == 2 * count
    assert (parts["EMA"], parts["GradientNorms"]) == (4 * count, 4 * count)
    without, _ = estimate(callbacks=callbacks)
    assert "GradientNorms" not in without  # it measures nothing


@pytest.mark.parametrize(
    ("updates", "ptx_coef", "tokens"),
    [
        (UpdateSchedule(), 0.0, 8 * 14),  # the rollout: 8 responses of 10 + 4 tokens
        (UpdateSchedule(), 1.0, 16 * 9),  # its 16 texts
        (UpdateSchedule(minibatch=4), 1.0, 8 * 9),
        (UpdateSchedule(microbatch=3), 1.0, 3 * 14),
        (UpdateSchedule(microbatch_tokens=40), 1.0, 40),
        (UpdateSchedule(microbatch_tokens=5), 1.0, 14),  # a longer sequence goes alone
        (UpdateSchedule(microbatch_tokens=1000), 0.0, 8 * 14),
    ],
)
def test_activations_are_those_of_the_largest_microbatch(estimate, updates, ptx_coef, tokens):
    parts, _ = estimate(updates=updates, ptx_coef=ptx_coef)
    assert parts["activations"] == pytest.approx(34 * 2 * tokens * 16 * 2)  # float32: twice the two bytes of the paper


@pytest.mark.parametrize(
    ("checkpointing", "precision", "bytes_a_unit"),
    [
        (False, "32-true", 2 * 68),  # two layers, four bytes for the paper's two
        (True, "32-true", 2 * 4 + 68),  # the inputs of both, and one at a time
        (False, "bf16-mixed", 2 * 34 * 1.4),
        (True, "bf16-mixed", 2 * 4 + 34 * 1.4),  # autocast leaves the inputs in float32
    ],
)
def test_activations_depend_on_precision_and_checkpointing(estimate, checkpointing, precision, bytes_a_unit):
    parts, _ = estimate(checkpointing=checkpointing, precision=precision, updates=UpdateSchedule(microbatch_tokens=40))
    assert parts["activations"] == pytest.approx(bytes_a_unit * 40 * 16, abs=1)


def test_responses_keep_the_activations_of_policy_and_value(estimate, make_folder):
    options = {"level": TokenLevel(), "advantage": GAE(), "value": ModelSource(path=make_folder("llama"))}
    parts, _ = estimate(updates=UpdateSchedule(microbatch_tokens=40), **options)
    assert parts["activations"] == pytest.approx(2 * 34 * 2 * 40 * 16 * 2)


def test_what_samples_and_what_learns_are_never_there_together():
    parts = {"weights": 1.0, "sampling copy": 3.0, "gradients": 1.0, "activations": 4.0}
    assert memory_peak(parts) == 6.0
    assert memory_peak(parts | {"activations": 1.0}) == 4.0
    assert memory_report(parts).endswith("most of it is activations")


def test_too_little_memory_names_the_setting_to_lower():
    parts = {"weights": 1.0, "activations": 4.0}
    assert memory_warning(parts, 5.0) is None
    assert memory_warning(parts, None) is None
    told = memory_warning(parts, 4.5)
    assert "needs about 5.00 GiB a process, and there are 4.50" in told
    assert "activations (4.00): lower `updates.microbatch_tokens`" in told
    assert "`policy.peft`" in memory_warning({"weights": 5.0}, 4.5)


def test_a_run_larger_than_the_machine_is_warned_of(fit, monkeypatch, caplog):
    monkeypatch.setattr("lightning_rlhf.callbacks.preflight.memory_available", lambda *_: 1e-6)
    fit()
    assert "preflight: this run needs about" in caplog.text


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"tolerance": -1.0}])
def test_small_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1, `tolerance` at least 0"):
        Preflight(**wrong)
