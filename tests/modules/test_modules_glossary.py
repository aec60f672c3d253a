"""The glossary holds every key that is logged and no other, and docs/metrics.md shows it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVLLM
from gathered import gathered
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from lightning_rlhf.callbacks import GradientNorms
from lightning_rlhf.core import (
    GAE,
    KTO,
    BanditAdvantage,
    ConstantSchedule,
    Curriculum,
    DynamicSampling,
    EntropyBonus,
    GroupAdvantage,
    KLPen,
    MaskTruncated,
)
from lightning_rlhf.engines import SamplingParams, VLLMServer
from lightning_rlhf.environments import Done, Environment
from lightning_rlhf.evaluation import AlignmentTax, BestOfN, GoldReward, MajorityAtK, PassAtK, WinRate
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, PreferenceModule, RewardModule, SFTModule
from lightning_rlhf.report.glossary import GLOSSARY, find, table
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.rollout import Episodes
from lightning_rlhf.types import ComparisonBatch

ENDS = list(range(10))
PROMPTS, TEXTS = [[12, 13], [10], [14, 15, 16, 11], [17]], [[12, 13, 14, 0], [10, 11, 0]]
SGD = partial(torch.optim.SGD, lr=0.01)
USUAL = {"optimizer": SGD, "schedule": ConstantSchedule()}


class Keys(Logger):
    """What reaches a logger."""

    name = version = "keys"

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def log_metrics(self, metrics, step=None):
        self.seen |= metrics.keys()

    def log_hyperparams(self, *_, **__): ...


class Data(LightningDataModule):
    """Ready loaders, of whose prompts there are always more."""

    def __init__(self, train, val) -> None:
        super().__init__()
        self.train_dataloader, self.val_dataloader = lambda: train, lambda: val

    def further_prompts(self, number):
        return next(iter(self.train_dataloader()))["prompts"]


class Once(Environment):
    """Ends after one turn."""

    def step(self, text, tool_calls):
        return Done()


def judge(prompts, first, second):
    return [0.5 + 0.1 * (len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def length(prompts, responses):
    return [float(len(response) % 5) for response in responses]


def vowels(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.fixture(scope="module")
def modules(make_lm, make_scorer, make_tokenizer, tmp_path_factory):
    """What logs differently: the stages, and in the third the pieces that log something of their own."""
    folder = str(tmp_path_factory.mktemp("policy"))
    make_lm(end=ENDS).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)

    def ppo(**options) -> PPOModule:
        usual = {"policy": make_lm(end=ENDS), "reward": vowels, "tokenizer": make_tokenizer()}
        return PPOModule(
            **gathered(**(usual | USUAL | {"generation": SamplingParams(max_new_tokens=4, seed=1)} | options))
        )

    evaluations = [WinRate(judge=judge), BestOfN(n=(1, 2)), GoldReward(reward=length), AlignmentTax()]
    evaluations += [PassAtK(k=(1, 2)), MajorityAtK(k=(2,))]
    parts = WeightedReward({"vowels": vowels, "length": length})
    return {
        "sft": SFTModule(make_lm(), make_tokenizer(), **USUAL),
        "reward": RewardModule(make_scorer(), **USUAL),
        "preference": PreferenceModule(make_lm(), KTO(), **USUAL),
        "ppo": ppo(reward=parts, evaluations=evaluations, ptx_coef=1.0),
        "gae": ppo(policy=ModelSource(path=folder), advantage=GAE()),
        "klpen": ppo(surrogate=KLPen(), advantage=BanditAdvantage(), masks=MaskTruncated()),
        "served": ppo(engine=VLLMServer(urls=[FakeVLLM(make_lm(end=ENDS)).url])),
        "episodes": ppo(environment=Episodes(factory=Once, tokens=8)),
        "dapo": ppo(
            advantage=GroupAdvantage(),
            dynamic_sampling=DynamicSampling(),
            curriculum=Curriculum(),
            entropy_bonus=EntropyBonus(),
            generation=SamplingParams(max_new_tokens=4, samples_per_prompt=2),
        ),
        "grpo": ppo(advantage=GroupAdvantage(), generation=SamplingParams(max_new_tokens=4, samples_per_prompt=2)),
    }


@pytest.fixture(scope="module")
def data(as_loader, left_padded, right_padded):
    prompts, texts = left_padded(PROMPTS), right_padded(TEXTS)
    held_out = [as_loader([prompts]), as_loader([texts])]
    tokens = torch.randint(10, 36, (3, 2, 24), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[24, 8], [8, 24], [10, 9]])
    mask = torch.arange(24) < lengths.unsqueeze(2)
    ranked = ComparisonBatch(
        tokens * mask, mask, torch.tensor([[0, 1]] * 3), torch.full((3, 2), torch.nan), [["a", "b"]] * 3, mask
    )
    found = {
        name: ([{"prompts": prompts, "pretrain": texts}], held_out)
        for name in ("ppo", "gae", "klpen", "served", "grpo", "dapo", "episodes")
    }
    found |= {"sft": ([texts], as_loader([texts])), "reward": ([ranked], [as_loader([ranked]), as_loader([texts])])}
    found |= {"preference": ([ranked], as_loader([ranked]))}
    return {name: (as_loader(train), val) for name, (train, val) in found.items()}


@pytest.fixture(scope="module")
def logged(modules, data, tmp_path_factory) -> set[str]:
    """Keys of a fit with validation and of a test, of every module."""
    keys = Keys()
    for name, module in modules.items():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=keys,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[GradientNorms()] if name == "ppo" else [],
            default_root_dir=tmp_path_factory.mktemp("runs"),
        )
        train, val = data[name]
        trainer.fit(module, datamodule=Data(train, val))
        trainer.test(module, val, verbose=False)
    return keys.seen


def test_every_logged_key_has_an_entry(logged):
    assert len(logged) > 100
    assert not sorted(key for key in logged if find(key) is None)


@pytest.mark.parametrize("entry", GLOSSARY, ids=lambda entry: entry.key)
def test_every_entry_is_logged(logged, entry):
    assert any(entry.matches(key) for key in logged)
    if entry.key.startswith("eval/"):
        assert any(entry.matches(key) for key in logged if key.startswith("test/"))


def test_no_key_has_two_entries(logged):
    twice = {key: [entry.key for entry in GLOSSARY if entry.matches(key)] for key in logged}
    assert not {key: entries for key, entries in twice.items() if len(entries) != 1}
    assert find("objective/score") is None
    assert find("eval/best_of_four/kl") is None
    assert find("test/objective/kl") is None


def test_page_shows_the_glossary():
    """To renew it, put what `lightning_rlhf.report.glossary.table()` returns into docs/metrics.md."""
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert table() in page
