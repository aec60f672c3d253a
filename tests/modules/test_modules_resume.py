"""A checkpoint is resumed by the run it is of, and refused by others with what differs."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gathered import gathered
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule

from lightning_rlhf.core import AdaptiveKL, Clip, ConstantSchedule, KLPen, LinearSchedule
from lightning_rlhf.core.settings import described, differences
from lightning_rlhf.data import ComparisonDataModule, PromptDataModule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, RewardModule, SFTModule
from lightning_rlhf.modules.resume import of_all_processes
from lightning_rlhf.rewards import LearnedReward, TimedReward, WeightedReward
from lightning_rlhf.rollout import UpdateSchedule

TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0]]


def letters(prompts, responses):
    return [float(len(response)) for response in responses]


def words(prompts, responses):
    return [1.0 for _ in responses]


@pytest.fixture
def prompts(write_rows):
    def write(count=4, letters="abcdefgh"):
        return write_rows(f"{count}.jsonl", [{"prompt": letter} for letter in letters[:count]])

    return write


@pytest.fixture
def fit(make_lm, make_trainer, toy_tokenizer, prompts, tmp_path):
    """Training from `ckpt_path`, and what a checkpoint of it is."""

    def run(ckpt_path=None, *, epochs=1, lm=None, rows=4, data=None, letters_of_rows="abcdefgh", **options):
        usual = {"reward": letters, "generation": SamplingParams(max_new_tokens=3), "beta": AdaptiveKL(), "shaping": ()}
        usual |= {
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "schedule": ConstantSchedule(),
            "updates": UpdateSchedule(),
        }
        module = PPOModule(make_lm(**lm or {}).double(), **gathered(tokenizer=toy_tokenizer, **usual | options))
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(
            module,
            PromptDataModule(train=prompts(rows, letters_of_rows), **{"batch_size": 2} | (data or {})),
            ckpt_path=ckpt_path,
        )
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return str(tmp_path / "x.ckpt")

    return run


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"surrogate": KLPen()}, "algorithm.surrogate.class: 'Clip' before, 'KLPen' now"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.01)}, "optimizer.class: 'Adam' before, 'SGD' now"),
        ({"reward": words}, "reward.fn: 'letters' before, 'words' now"),
        ({"schedule": LinearSchedule()}, "schedule.class: 'ConstantSchedule' before, 'LinearSchedule' now"),
        ({"lm": {"width": 32}}, "policy.network.transformer.wte.weight: '[36, 16]' before, '[36, 32]' now"),
        ({"lm": {"kind": "llama"}}, "policy.class: 'GPT2LMHeadModel' before, 'LlamaForCausalLM' now"),
        ({"lm": {"seed": 1}}, "policy.weights at the start: "),  # of which the reference is a copy
        ({"rows": 5}, "rows.train: 4 before, 5 now"),
        ({"data": {"seed": 1}}, "seed: 0 before, 1 now"),
        ({"data": {"batch_size": 4}}, "batch_size of all processes: 2 before, 4 now"),
    ],
)
def test_checkpoint_of_another_run_is_refused_with_what_differs(fit, changes, said):
    path = fit()
    with pytest.raises(ValueError, match="of another run") as refused:
        fit(path, epochs=2, **changes)
    assert said in str(refused.value)
    assert "leave out --ckpt_path" in str(refused.value)


def test_all_differences_are_listed(fit):
    path = fit()
    with pytest.raises(ValueError, match="of another run, written by version") as refused:
        fit(path, epochs=2, ptx_coef=0.5, surrogate=KLPen())
    assert [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:-1]] == [
        "algorithm.surrogate.class",
        "algorithm.surrogate.epsilon",
        "algorithm.surrogate.epsilon_high",
        "algorithm.surrogate.dual",
        "algorithm.surrogate.coef",
        "algorithm.surrogate.target",
        "algorithm.ptx_coef",
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"surrogate": Clip(epsilon=0.3)}, "algorithm.surrogate.epsilon: 0.2 before, 0.3 now"),
        ({"beta": AdaptiveKL(target=9.0)}, "algorithm.beta.target: 6.0 before, 9.0 now"),
        ({"beta": AdaptiveKL(coef=0.5)}, "algorithm.beta.coef: 0.15 before, 0.5 now"),
        ({"generation": SamplingParams(max_new_tokens=4)}, "generation.max_new_tokens: 3 before, 4 now"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.02)}, "optimizer.lr: 0.01 before, 0.02 now"),
        ({"data": {"max_prompt_tokens": 1}}, None),  # of which every prompt is one
    ],
)
def test_other_numbers_are_taken_and_listed(fit, caplog, changes, said):
    path = fit()
    caplog.set_level(logging.WARNING)
    fit(path, epochs=2, **changes)
    listed = [line.strip() for line in caplog.text.splitlines() if " before, " in line]
    assert listed == ([said] if said else [])


def test_other_learning_rate_is_the_one_that_trains(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    """Of the optimizer, its schedule and both of their checkpoints."""

    def run(lr, epochs, ckpt_path=None):
        module = SFTModule(make_lm().double(), optimizer=partial(torch.optim.SGD, lr=lr), schedule=ConstantSchedule())
        trainer = make_trainer(max_epochs=epochs)
        before = torch.load(ckpt_path)["state_dict"] if ckpt_path else None
        trainer.fit(module, as_loader([right_padded(TEXTS)]), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{lr}.ckpt")
        return before, module.state_dict(), trainer

    run(0.01, 1)
    before, small, _ = run(0.01, 2, tmp_path / "0.01.ckpt")
    run(0.01, 1)
    _, large, trainer = run(0.03, 2, tmp_path / "0.01.ckpt")
    name = "model.network.transformer.wte.weight"
    step = small[name] - before[name]
    assert step.abs().max() > 0
    assert torch.allclose(large[name] - before[name], 3 * step, rtol=1e-9, atol=1e-15)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.03
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.03]


def test_other_start_of_an_adaptive_coefficient_is_taken(fit, tmp_path):
    state = torch.load(fit(), weights_only=True)["rlhf"]["algorithm"]["beta.coef"]
    kept = torch.load(fit(tmp_path / "x.ckpt", epochs=1), weights_only=True)["rlhf"]["algorithm"]["beta.coef"]
    assert kept == state != 0.15
    assert (
        torch.load(fit(tmp_path / "x.ckpt", beta=AdaptiveKL(coef=0.5)), weights_only=True)["rlhf"]["algorithm"][
            "beta.coef"
        ]
        == 0.5
    )


def test_rows_are_told_by_their_content(fit):
    path = fit()
    with pytest.raises(ValueError, match=r"content.train: '\w+' before, '\w+' now"):
        fit(path, epochs=2, letters_of_rows="abcx")


def test_rows_that_a_template_writes_otherwise_are_warned_of(fit, toy_tokenizer, caplog):
    """As one does that writes today's date: the rows are the same."""
    dialogues = {"prompt_role": "user"}
    path = fit(data=dialogues)
    toy_tokenizer.chat_template = "a " + toy_tokenizer.chat_template
    caplog.set_level(logging.WARNING)
    fit(path, epochs=2, data=dialogues)
    assert "its data differs from the checkpoint's" in caplog.text
    assert "tokens, as the chat template writes them today.train: " in caplog.text


def test_key_that_another_version_lacks_is_no_other_run(fit, tmp_path, caplog):
    kept = torch.load(fit(), weights_only=True)
    assert kept["rlhf"]["version"] == importlib.metadata.version("lightning-rlhf")
    del kept["rlhf"]["settings"]["algorithm"]["ptx_coef"]
    torch.save(kept, tmp_path / "older.ckpt")
    caplog.set_level(logging.WARNING)
    fit(tmp_path / "older.ckpt", epochs=2)
    assert "algorithm.ptx_coef: 'nothing' before, 0.0 now" in caplog.text


def test_what_changes_only_memory_may_change(fit):
    path = fit()
    fit(path, epochs=2, updates=UpdateSchedule(microbatch=1), generation=SamplingParams(max_new_tokens=3, slots=1))


def test_evaluation_takes_any_settings(fit, make_lm, make_trainer, toy_tokenizer, prompts):
    path = fit()
    different = {"generation": SamplingParams(max_new_tokens=5), "beta": AdaptiveKL(target=1.0)}
    module = PPOModule(make_lm().double(), words, **gathered(tokenizer=toy_tokenizer, **different))
    make_trainer().validate(module, PromptDataModule(val=prompts(3)), ckpt_path=path, verbose=False)


@pytest.fixture
def fit_folders(make_folder, make_trainer, prompts, tmp_path):
    """As `fit`, of a policy, a reward and a reference that lie in folders; what was changed last is given anew."""
    given = {"policy": make_folder(), "reward": make_folder(scorer=True), "reference": make_folder(seed=1)}

    def run(ckpt_path=None, *, epochs=1, **folders):
        given.update(folders)
        policy, reference = (ModelSource(path=given[name]) for name in ("policy", "reference"))
        reward = WeightedReward({"learned": TimedReward(LearnedReward(given["reward"]))})
        module = PPOModule(policy, reward, reference=reference, generation=SamplingParams(max_new_tokens=2))
        trainer = make_trainer(max_epochs=epochs, precision="32-true")
        trainer.fit(module, PromptDataModule(train=prompts(), batch_size=4), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "folders.ckpt")
        return tmp_path / "folders.ckpt"

    return given, run


def test_moved_folders_are_the_same_models(fit_folders, tmp_path):
    given, run = fit_folders
    path = run()
    moved = {name: shutil.move(folder, tmp_path / f"moved-{name}") for name, folder in given.items()}
    run(path, epochs=2, **{name: str(folder) for name, folder in moved.items()})


@pytest.mark.parametrize(
    ("network", "file", "said"),
    [
        ("policy", "config.json", r"policy\.folder\.config\.json\.layer_norm_epsilon: 1e-05 before, 0\.5 now"),
        ("policy", "chat_template.jinja", r"policy\.folder\.chat_template\.jinja: '\d+ bytes, \w{16}' before"),
        ("reference", "model.safetensors", r"reference\.folder\.model\.safetensors: '\d+ bytes"),
        ("reward", "model.safetensors", r"reward\.members\.learned\.reward\.model\.folder\.model\.safetensors: "),
    ],
)
def test_changed_folder_at_the_same_path_is_another_model(fit_folders, network, file, said):
    given, run = fit_folders
    path, changed = run(), Path(given[network]) / file
    content = changed.read_bytes()
    changed.write_bytes(content.replace(b"1e-05", b"0.5").replace(b"for m in", b"for  m in"))
    if file == "model.safetensors":
        changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert changed.read_bytes() != content
    with pytest.raises(ValueError, match=said) as refused:
        run(path, epochs=2)
    assert len(str(refused.value).splitlines()) == 3  # and nothing else differs


class Foreign(LightningModule):
    """Nothing of this library's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def stages(make_lm, make_scorer, toy_tokenizer, as_loader, left_padded, right_padded, write_rows):
    """Each module with two rows to train on."""
    pair = write_rows("pair.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    short = {"tokenizer": toy_tokenizer, "generation": SamplingParams(max_new_tokens=1)}
    return {
        "PPOModule": lambda: (
            PPOModule(make_lm().double(), letters, **gathered(**short)),
            as_loader([{"prompts": left_padded([[12], [13]])}]),
        ),
        "SFTModule": lambda: (SFTModule(make_lm().double()), as_loader([right_padded(TEXTS)])),
        "RewardModule": lambda: (
            RewardModule(make_scorer().double(), tokenizer=toy_tokenizer),
            ComparisonDataModule(train=pair, val=pair, batch_size=2),
        ),
        "Foreign": lambda: (Foreign(), as_loader([1])),
    }


def test_checkpoint_of_another_module_is_refused(stages, make_trainer, tmp_path):
    """In training and in evaluation, whichever of them wrote it; each takes its own."""
    for writer, make in stages.items():
        trainer = make_trainer()
        trainer.fit(*make())
        trainer.save_checkpoint(tmp_path / f"{writer}.ckpt")
    holds = {"PPOModule": "`policy`", "SFTModule": "`model`", "RewardModule": "`model`", "Foreign": "`layer`"}
    for reader in list(stages)[:3]:
        for writer in stages:
            if writer == reader:
                make_trainer(max_epochs=2).fit(*stages[reader](), ckpt_path=tmp_path / f"{writer}.ckpt")
                continue
            for act in (make_trainer().fit, make_trainer().validate):
                with pytest.raises(ValueError, match="^the checkpoint was") as refused:
                    act(*stages[reader](), ckpt_path=tmp_path / f"{writer}.ckpt")
                by = f"written by {writer}, not by" if writer in ("SFTModule", "RewardModule") else "not written by"
                assert str(refused.value) == (
                    f"the checkpoint was {by} {reader}, which holds {holds[reader]}: it holds {holds[writer]}; give a "
                    f"checkpoint of {reader}, or hand a model on as the folder that `save_pretrained` writes"
                )


def test_checkpoint_without_our_own_part_is_refused(fit, tmp_path, monkeypatch):
    """Though it holds a network of the right name."""
    monkeypatch.chdir(tmp_path)
    for kept in ({}, {"rlhf": 3}, {"rlhf": {"iteration": 1}}):
        torch.save({"state_dict": {"policy.x": torch.ones(1)}, "pytorch-lightning_version": "2.6.0"} | kept, "x.ckpt")
        with pytest.raises(ValueError, match="not written by PPOModule, .*: it holds `policy`"):
            fit("x.ckpt")


def test_own_subclass_takes_what_the_class_wrote(stages, make_lm, make_trainer, tmp_path):
    class Mine(SFTModule):
        pass

    trainer = make_trainer()
    module, data = stages["SFTModule"]()
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    make_trainer(max_epochs=2).fit(Mine(make_lm().double()), data, ckpt_path=tmp_path / "sft.ckpt")


def test_other_stages_refuse_too(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    def run(lr, epochs, ckpt_path=None, optimizer=torch.optim.Adam):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(
            SFTModule(make_lm().double(), optimizer=partial(optimizer, lr=lr)),
            as_loader([right_padded(TEXTS)]),
            ckpt_path=ckpt_path,
        )
        trainer.save_checkpoint(tmp_path / "sft.ckpt")

    run(0.01, 1)
    run(0.01, 2, tmp_path / "sft.ckpt")
    with pytest.raises(ValueError, match="optimizer.class: 'Adam' before, 'SGD' now"):
        run(0.5, 3, tmp_path / "sft.ckpt", torch.optim.SGD)


class Colour(StrEnum):
    RED = "red"


def test_description_is_plain_and_says_what_it_is_of():
    assert type(described(Colour.RED)) is str
    found = described({"a": Clip(epsilon=0.1), "f": letters, "x": (1, {2})})
    assert found["a"]["class"] == "Clip"
    assert (found["a"]["epsilon"], found["f"], found["x"]) == (0.1, "letters", [1, ["2"]])
    assert list(differences(found, found)) == []
    assert [str(x) for x in differences({"a": 1}, {"a": 1, "b": 2})] == ["b: 'nothing' before, 2 now"]


class Lengths:
    def __init__(self, most: int = 3) -> None:
        self.most = most

    def identity(self):
        return {"most": self.most}

    def score(self, texts):
        return [min(len(text), self.most) for text in texts]


def factory_of_config(init_args: dict) -> Callable[[], Lengths]:
    """What the command line makes of a factory in YAML."""
    parser = ArgumentParser()
    parser.add_argument("--factory", type=Callable[[], Lengths])
    config = parser.parse_object({"factory": {"class_path": f"{__name__}.Lengths", "init_args": init_args}})
    return parser.instantiate(config).factory


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (partial(Lengths, most=2), partial(Lengths, most=9), ["f.most: 2 before, 9 now"]),
        (partial(Lengths, 2), partial(Lengths, 9), ["f.arguments: [2] before, [9] now"]),
        (partial(Lengths, most=2), partial(letters), ["f.class: 'Lengths' before, 'letters' now"]),
        (partial(partial(Lengths, most=2)), partial(Lengths, most=2), []),
        (Lengths(2).score, Lengths(9).score, ["f.of.most: 2 before, 9 now"]),
    ],
)
def test_arguments_of_what_is_called_later_are_told_apart(before, now, said):
    listed = [str(x) for x in differences(described({"f": before}), described({"f": now}))]
    assert listed[: len(said) or None] == said


def test_factory_of_a_config_is_described_as_that_of_python():
    assert described(factory_of_config({"most": 2})) == described(partial(Lengths, most=2))
    assert described(factory_of_config({"most": 2})) != described(factory_of_config({"most": 9}))


@pytest.mark.parametrize(
    ("minibatch", "world", "expected"), [(4, 1, 4), (2, 2, 4), (1, 4, 4), (4, 2, 8), (None, 2, None)]
)
def test_minibatch_of_a_checkpoint_is_that_of_all_processes(make_lm, minibatch, world, expected):
    module = PPOModule(make_lm(), letters, updates=UpdateSchedule(minibatch=minibatch))
    described_updates = of_all_processes(module._settings, SimpleNamespace(world_size=world))["updates"]
    assert described_updates["minibatch of all processes"] == expected
    assert "minibatch" not in described_updates
