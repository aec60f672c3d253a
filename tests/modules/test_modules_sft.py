"""SFTModule: the loss by hand, the folder it leaves, and the road from it to the other stages."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.callbacks import Export
from lightning_rlhf.core import GAE, Algorithm, ConstantSchedule, CosineSchedule, TokenLevel
from lightning_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.rewards import LearnedReward
from lightning_rlhf.rollout import UpdateSchedule

TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0], [14, 15, 16, 17, 18, 19, 0]]
CONTEXT = 2  # the prompt's tokens


def naive_losses(network, texts=TEXTS) -> list[torch.Tensor]:
    losses = []
    for text in texts:
        logits = network(input_ids=torch.tensor([text])).logits[0].log_softmax(-1)
        losses += [-logits[i - 1, text[i]] for i in range(CONTEXT, len(text))]
    return losses


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_step_descends_the_mean_over_response_tokens(make_lm, make_trainer, as_loader, right_padded, kind):
    lr = 0.01
    module = SFTModule(make_lm(kind).double(), optimizer=partial(torch.optim.SGD, lr=lr), schedule=ConstantSchedule())
    trainer = make_trainer()
    trainer.fit(module, as_loader([right_padded(TEXTS, context=CONTEXT, fill=9)]))
    network = make_lm(kind).double().eval()
    losses = naive_losses(network)
    loss = sum(losses) / len(losses)
    loss.backward()
    tolerance = 1e-10 if kind == "gpt2" else 1e-5  # Llama's norm computes in float32 whatever its weights are
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), abs=1e-6)  # logged as float32
    for new, old in zip(module.model.network.parameters(), network.parameters(), strict=True):
        step = torch.zeros_like(old) if old.grad is None else old.grad
        assert torch.allclose((old.detach() - new.detach()) / lr, step, rtol=0, atol=tolerance)


def test_evaluation_is_the_mean_over_all_tokens(make_lm, make_trainer, as_loader, right_padded):
    """Batches of unequal length, and a batch of fillers alone."""
    batches = [right_padded(TEXTS[:1], context=CONTEXT), right_padded(TEXTS[1:], context=CONTEXT)]
    filler = right_padded(TEXTS, context=CONTEXT)
    batches.append(filler._replace(target=torch.zeros_like(filler.target)))
    module = SFTModule(make_lm().double())
    losses = naive_losses(make_lm().double().eval())
    expected = float(sum(losses) / len(losses))
    for method, name in (("validate", "eval/loss"), ("test", "test/loss")):
        (found,) = getattr(make_trainer(), method)(module, as_loader(batches), verbose=False)
        assert found[name] == pytest.approx(expected, abs=1e-6)


def test_schedule_decays_per_optimizer_step(make_lm, make_trainer, as_loader, right_padded):
    rates = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    module = SFTModule(make_lm(), optimizer=partial(Watch, lr=1.0), schedule=CosineSchedule(floor=0.0))
    make_trainer(max_epochs=2).fit(module, as_loader([right_padded(TEXTS)] * 2))
    assert rates == pytest.approx([1.0, 0.8535533905932737, 0.5, 0.14644660940672624])  # ½(1 + cos πk/4)


def test_checkpoint_loads_by_lightnings_own_method(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    module = SFTModule(make_lm().double(), optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer = make_trainer()
    trainer.fit(module, as_loader([right_padded(TEXTS)]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SFTModule.load_from_checkpoint(tmp_path / "x.ckpt", model=make_lm(seed=5).double())
    for a, b in zip(loaded.model.parameters(), module.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exported_folder_is_a_hugging_face_folder(make_folder, make_trainer, as_loader, right_padded, tmp_path, kind):
    module = SFTModule(ModelSource(path=make_folder(kind)), optimizer=partial(torch.optim.SGD, lr=0.1))
    out = tmp_path / "out"
    make_trainer(precision="32-true", callbacks=[Export(str(out))]).fit(module, as_loader([right_padded(TEXTS)]))
    plain = AutoModelForCausalLM.from_pretrained(out)
    for a, b in zip(plain.parameters(), module.model.network.parameters(), strict=True):
        assert torch.equal(a, b)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a b")["input_ids"] == [10, 11]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"


@pytest.fixture
def files(write_rows):
    words = ["a b", "c", "d e f", "g", "h i", "j"]
    return {
        "demonstrations": write_rows("d.jsonl", [{"prompt": w, "response": "x y"} for w in words]),
        "comparisons": write_rows("c.jsonl", [{"prompt": w, "chosen": "x y", "rejected": "z"} for w in words]),
        "prompts": write_rows("p.jsonl", [{"prompt": w} for w in words]),
        "texts": write_rows("t.jsonl", [{"text": "k l m n o p q"} for _ in words]),
    }


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_three_stages_hand_over_folders(make_folder, make_trainer, files, tmp_path, kind):
    adam = partial(torch.optim.Adam, lr=0.01)
    stages = [str(tmp_path / name) for name in ("sft", "rm", "ppo")]

    def train(module, data, out):
        make_trainer(precision="32-true", callbacks=[Export(out)]).fit(module, data)
        return module

    sft = train(
        SFTModule(ModelSource(path=make_folder(kind)), optimizer=adam),
        DemonstrationDataModule(train=files["demonstrations"], batch_size=3),
        stages[0],
    )
    reward = train(
        RewardModule(ModelSource(path=stages[0]), optimizer=adam),
        ComparisonDataModule(
            train=files["comparisons"],
            val=files["comparisons"],
            demonstrations=files["demonstrations"],
            batch_size=3,
        ),
        stages[1],
    )
    assert reward.model.bias != 0.0
    ppo = PPOModule(
        ModelSource(path=stages[0]),
        LearnedReward(stages[1]),
        generation=SamplingParams(max_new_tokens=4),
        updates=UpdateSchedule(minibatch=3),
        algorithm=Algorithm(level=TokenLevel(), advantage=GAE(), ptx_coef=0.5),
        optimizer=adam,
        schedule=ConstantSchedule(),
    )
    data = PromptDataModule(
        train=files["prompts"], val=files["prompts"], pretrain=files["texts"], batch_size=6, text_tokens=4
    )
    trainer = make_trainer(precision="32-true", callbacks=[Export(stages[2])])
    trainer.fit(ppo, data)
    assert {"eval/reward", "eval/kl"} <= trainer.callback_metrics.keys()
    assert ppo.reward.model.bias == reward.model.bias
    for a, b in zip(ppo.collector.reference.frozen.parameters(), sft.model.parameters(), strict=True):
        assert torch.equal(a, b)  # the reference is the SFT model
    starts = AutoModelForSequenceClassification.from_pretrained(stages[1])
    assert any(  # V began at the reward model and moved
        not torch.equal(a, b) for a, b in zip(ppo.value.network.parameters(), starts.parameters(), strict=True)
    )
    for a, b in zip(
        AutoModelForCausalLM.from_pretrained(stages[2]).parameters(), ppo.policy.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_ppo_resumes_in_the_middle_of_an_epoch(make_folder, make_trainer, files, tmp_path, token_reward):
    """With the library's loader: interrupted after the third of six rollouts."""
    from lightning.pytorch import Callback

    folder = make_folder()

    class Interruption(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if pl_module.iteration == 3:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")
                trainer.should_stop = True

    def make():
        module = PPOModule(
            ModelSource(path=folder, dtype="float64"),
            token_reward(),
            generation=SamplingParams(max_new_tokens=4),
            updates=UpdateSchedule(minibatch=2),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            algorithm=Algorithm(ptx_coef=0.5),
            schedule=ConstantSchedule(warmup=5),
        )
        data = PromptDataModule(train=files["prompts"], pretrain=files["texts"], batch_size=2, text_tokens=4)
        return module, data

    whole, half, rest = make(), make(), make()
    make_trainer(max_epochs=2).fit(*whole)
    make_trainer(max_epochs=2, callbacks=[Interruption()], min_epochs=0).fit(*half)
    make_trainer(max_epochs=2).fit(*rest, ckpt_path=tmp_path / "mid.ckpt")
    assert whole[0].iteration == rest[0].iteration == 6
    assert half[0].iteration == 3
    for a, b in zip(whole[0].policy.parameters(), rest[0].policy.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["validate", "test"])
def test_training_follows_an_evaluation(make_lm, make_trainer, as_loader, right_padded, method):
    """Outside `fit` an evaluation is inference mode, whose tensors can't be written later."""
    module = SFTModule(make_lm().double(), optimizer=partial(torch.optim.SGD, lr=0.1))
    batches = as_loader([right_padded(TEXTS, context=CONTEXT)] * 2)
    (first,) = getattr(make_trainer(), method)(module, batches, verbose=False)
    trainer = make_trainer()
    trainer.fit(module, batches, batches)
    assert float(trainer.callback_metrics["eval/loss"]) < next(iter(first.values()))


@pytest.mark.parametrize(("end", "named"), [("<|im_end|>", 0), ("<|im_end|>", [0, 4]), ("</s>", 0), ("<|im_end|>", 4)])
def test_rollouts_end_where_sft_taught_them_to(make_folder, make_trainer, toy_tokenizer, tmp_path, end, named):
    """Whatever end token the tokenizer and the generation config name, the template's <|im_end|> (4) is taught."""
    toy_tokenizer.eos_token = end
    source = ModelSource(path=make_folder(end=named, tokenizer=toy_tokenizer), dtype="float64")
    asked = [{"role": "user", "content": "a b"}]
    data = [{"messages": [*asked, {"role": "assistant", "content": "c d"}]}]
    sft = SFTModule(source, optimizer=partial(torch.optim.Adam, lr=0.02), schedule=ConstantSchedule())
    make_trainer(max_epochs=40).fit(sft, DemonstrationDataModule(train=data, batch_size=1))
    sft.save_pretrained(tmp_path / "sft")
    config = json.loads((tmp_path / "sft" / "generation_config.json").read_text("utf-8"))
    ends = {4, toy_tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    assert config["eos_token_id"] == named if ends == {4} else set(config["eos_token_id"]) == ends
    policy = ModelSource(path=str(tmp_path / "sft"), dtype="float64")
    ppo = PPOModule(policy, reward=lambda prompts, responses: [1.0], generation=SamplingParams(max_new_tokens=12))
    (found,) = make_trainer().validate(
        ppo, PromptDataModule(train=[{"prompt": asked}], val=[{"prompt": asked}], batch_size=1), verbose=False
    )
    assert (found["eval/eos_rate"], found["eval/response_length"]) == (1.0, 3.0)  # c d <|im_end|>
