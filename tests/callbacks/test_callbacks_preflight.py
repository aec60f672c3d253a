"""Preflight passes a sound run without leaving a trace, and each of its checks finds what it is for."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn

from lightning_rlhf.callbacks import Preflight
from lightning_rlhf.callbacks.preflight_memory import memory_estimate
from lightning_rlhf.core import Constant
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.rollout import Generation, LearnedReward

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]


@pytest.fixture
def fit(make_lm, make_trainer, as_loader, left_padded, token_reward, toy_tokenizer):
    """Two rollouts; the module."""

    def run(preflight=True, *, lm=None, rows=None, change=lambda module: None, trainer_options=None, **options):
        usual = {"generation": Generation(max_new_tokens=4), "schedule": Constant(), "tokenizer": toy_tokenizer}
        usual |= {"reward": token_reward(), "optimizer": partial(torch.optim.Adam, lr=0.01)}
        module = PPOModule((lm or make_lm()).double(), **usual | options)
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
    assert "preflight: at least" in caplog.text
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
        fit(change=lambda module: disturb(module.collector.reference))
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


def test_memory_is_counted_by_hand(make_lm, token_reward):
    network = make_lm().double()
    module = PPOModule(network, token_reward())
    module.configure_model()
    size = 8 * sum(p.numel() for p in network.parameters()) / 2**30
    assert memory_estimate(module) == pytest.approx(
        {"weights": size, "gradients": size, "optimizer": 2 * size, "frozen networks": size}
    )


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"tolerance": -1.0}])
def test_small_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1, `tolerance` at least 0"):
        Preflight(**wrong)
