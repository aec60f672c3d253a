"""LoRA adapters: the reference is the adapter off, only the adapter trains, the merge is the adapted model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gathered import gathered
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_rlhf.core import Algorithm, ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource, ScalarModel
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.rollout import UpdateSchedule
from lightning_rlhf.types import ComparisonBatch

peft = pytest.importorskip("peft")
RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]
TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0], [14, 15, 16, 17, 18, 19, 0]]
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
ADAM = partial(torch.optim.Adam, lr=0.05)


def lora(kind: str, **options):
    return peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[kind], **options)


@pytest.fixture
def trained(make_folder, make_trainer, as_loader, left_padded, token_reward, recorder):
    """A PPOModule with an adapter after three rollouts, its start folder, and the recorder."""

    def run(kind="gpt2", **options):
        folder = make_folder(kind, end=[0, 1, 2, 3, 4, 5])
        module = PPOModule(
            ModelSource(path=folder, peft=lora(kind)),
            token_reward(),
            **gathered(
                generation=SamplingParams(max_new_tokens=4),
                updates=UpdateSchedule(epochs=2, minibatch=2),
                shaping=(),
                optimizer=ADAM,
                schedule=ConstantSchedule(),
                **options,
            ),
        )
        make_trainer(callbacks=[recorder], precision="32-true").fit(
            module, as_loader([{"prompts": left_padded(RAGGED)}] * 3)
        )
        return module, folder

    return run


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_reference_is_the_adapter_off(trained, recorder, kind, left_padded):
    module, folder = trained(kind)
    assert module.collector.reference.frozen is None
    assert recorder.steps[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(recorder.steps[2]["objective/kl"]) > 1e-3
    rollout = module.collector.respond(left_padded(RAGGED), samples=1, stream="t", iteration=0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for i, prompt in enumerate(RAGGED):
        text = rollout.tokens[i, rollout.prompt_width :][rollout.response_mask[i]].tolist()
        logits = plain(input_ids=torch.tensor([prompt + text])).logits[0].log_softmax(-1)
        for t, token in enumerate(text):
            expected = float(logits[len(prompt) + t - 1, token])
            assert float(rollout.ref_logprobs[i, t]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_adapter_alone_trains(trained, kind):
    module, folder = trained(kind)
    plain = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    moved = 0
    for name, p in module.policy.network.get_base_model().named_parameters():
        if "lora_" in name:
            assert p.requires_grad
            moved += float(p.abs().sum()) > 0 and "lora_B" in name  # B starts at 0
        else:
            assert not p.requires_grad
            assert torch.equal(p, plain[name.replace(".base_layer", "")])
    assert moved == 2 * len(TARGETS[kind])
    optimized = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    assert len(optimized) == 4 * len(TARGETS[kind])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_merged_folder_equals_the_adapted_model(trained, tmp_path, kind):
    module, folder = trained(kind)
    module.save_pretrained(tmp_path / "merged", merge_adapter=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.tensor([[12, 13, 14, 15]])
    adapted = module.policy.network.eval()(input_ids=tokens).logits
    assert torch.allclose(merged(input_ids=tokens).logits, adapted, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not torch.allclose(plain(input_ids=tokens).logits, adapted, atol=1e-2)
    after = module.policy.network(input_ids=tokens).logits  # the live model still wears its adapter
    assert torch.equal(after, adapted)
    assert any("lora_" in name for name, _ in module.policy.named_parameters())


def test_merging_without_an_adapter_is_refused(make_lm, make_scorer, tmp_path):
    with pytest.raises(ValueError, match="merge_adapter"):
        SFTModule(make_lm()).save_pretrained(tmp_path / "x", merge_adapter=True)
    with pytest.raises(ValueError, match="merge_adapter"):
        RewardModule(make_scorer()).save_pretrained(tmp_path / "y", merge_adapter=True)


def test_adapter_folder_continues_as_a_policy(make_folder, make_trainer, as_loader, right_padded, tmp_path):
    """SFT with an adapter, exported unmerged: policy and reference start at the tuned model, and all is saved."""
    sft = SFTModule(ModelSource(path=make_folder(), peft=lora("gpt2")), optimizer=ADAM, schedule=ConstantSchedule())
    make_trainer(precision="32-true").fit(sft, as_loader([right_padded(TEXTS)] * 3))
    sft.save_pretrained(tmp_path / "sft")
    tokens = torch.tensor([[12, 13, 14, 15]])
    tuned = sft.model.network.eval()(input_ids=tokens).logits

    for number, config in enumerate((None, lora("gpt2"))):
        ppo = PPOModule(ModelSource(path=str(tmp_path / "sft"), peft=config), torch.nn.Identity(), optimizer=ADAM)
        ppo.configure_model()
        with torch.no_grad():
            for p in ppo.policy.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            learned = ppo.policy.network.eval()(input_ids=tokens).logits
            with ppo.policy.reference():
                found = (ppo.collector.reference.frozen or ppo.policy).network.eval()(input_ids=tokens).logits
        assert torch.allclose(found, tuned, atol=1e-5)  # π_ref is the SFT model, not the model before SFT
        assert not torch.allclose(learned, tuned, atol=1e-2)
        out = tmp_path / f"ppo{number}"
        ppo.save_pretrained(out, merge_adapter=config is not None)
        again = ModelSource(path=str(out)).causal_lm().eval()
        assert torch.allclose(again(input_ids=tokens).logits, learned, atol=1e-4)


@pytest.fixture
def ranked() -> ComparisonBatch:
    tokens = torch.tensor([[[12, 13, 20, 0], [12, 13, 21, 0]], [[10, 30, 0, 0], [10, 31, 32, 0]]])
    mask = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
    return ComparisonBatch(tokens, mask, torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), torch.nan))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_reward_model_trains_adapter_and_head(make_folder, make_trainer, as_loader, ranked, tmp_path, kind):
    folder = make_folder(kind)
    torch.manual_seed(0)
    module = RewardModule(ModelSource(path=folder, peft=lora(kind)), optimizer=ADAM, schedule=ConstantSchedule())
    module.configure_model()
    before = module.eval().rank(ranked).detach()
    make_trainer(precision="32-true").fit(module, as_loader([ranked] * 5))
    names = [name for name, p in module.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names)
    found = module.eval().rank(ranked).detach()
    assert not torch.allclose(found, before, atol=1e-2)
    module.model.bias = 0.75
    shifted = module.rank(ranked).detach()
    module.save_pretrained(tmp_path / "merged", merge_adapter=True)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.demonstration_bias == 0.75
    again = RewardModule(ModelSource(path=str(tmp_path / "merged")))
    again.configure_model()
    assert torch.allclose(again.eval().rank(ranked), shifted, atol=1e-4)


def test_reward_adapter_folder_keeps_head_and_bias(make_folder, ranked, tmp_path):
    module = RewardModule(ModelSource(path=make_folder(), peft=lora("gpt2")))
    module.configure_model()
    module.model.bias = 0.75
    expected = module.eval().rank(ranked).detach()
    module.save_pretrained(tmp_path / "adapter")
    loaded = ScalarModel.load(ModelSource(path=str(tmp_path / "adapter")), new_head=False)
    assert loaded.bias == 0.75
    again = RewardModule(loaded.network)
    again.configure_model()
    again.model.bias = 0.75
    assert torch.allclose(again.eval().rank(ranked), expected, atol=1e-5)


def test_lora_dropout_is_off(make_folder):
    network = ModelSource(path=make_folder(), peft=lora("gpt2", lora_dropout=0.5, init_lora_weights=False)).causal_lm()
    tokens = torch.tensor([[12, 13, 14, 15]])
    network.train()
    assert torch.equal(network(input_ids=tokens).logits, network(input_ids=tokens).logits)


def test_adapter_checkpoint_resumes(trained, make_trainer, as_loader, left_padded, tmp_path, token_reward):
    module, folder = trained()
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = PPOModule(
        ModelSource(path=folder, peft=lora("gpt2")),
        token_reward(),
        generation=SamplingParams(max_new_tokens=4),
        updates=UpdateSchedule(epochs=2, minibatch=2),
        algorithm=Algorithm(shaping=()),
        optimizer=ADAM,
        schedule=ConstantSchedule(),
    )
    make_trainer(max_epochs=1, precision="32-true").fit(
        other, as_loader([{"prompts": left_padded(RAGGED)}] * 3), ckpt_path=tmp_path / "x.ckpt"
    )
    for (name, a), b in zip(other.policy.named_parameters(), module.policy.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_no_peft_config_is_refused(make_folder):
    with pytest.raises(ValueError, match="PeftConfig"):
        ModelSource(path=make_folder(), peft={"r": 4}).causal_lm()
