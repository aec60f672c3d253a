"""Lightning's own callbacks beside `PPOModule`, and its exported policy in `transformers.pipeline`: one run for all."""

from __future__ import annotations

import csv
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from transformers import pipeline

from lightning_rlhf.callbacks import Export
from lightning_rlhf.core import Algorithm, LinearSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import Reward
from lightning_rlhf.rollout import UpdateSchedule

HELD_OUT = [1.0, 3.0, 2.0, 0.0, 9.0]
"""Mean score of each validation in turn: the best is the second, and two after it are worse."""
RATE = 0.05
EPOCHS = 5
CHAT = [{"role": "user", "content": "a b"}]
AS_TEXT = {"tokenize": False, "add_generation_prompt": True}


class Scripted(Reward, Callback):
    """`HELD_OUT` while it validates, else the last token's number, which differs between responses and so trains."""

    def __init__(self) -> None:
        self.validations, self.validating = 0, False

    def on_validation_start(self, *_: Any) -> None:
        self.validating = True

    def on_validation_end(self, *_: Any) -> None:
        self.validations, self.validating = self.validations + 1, False

    def __call__(self, rollout: Any, rows: Any) -> torch.Tensor:
        scores = rollout.tokens[:, -1].double() / 36
        return torch.full_like(scores, HELD_OUT[self.validations]) if self.validating else scores


class Weights(Callback):
    """The policy after each epoch of training."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in pl_module.policy.named_parameters()})


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, make_lm: Any, make_tokenizer: Any, left_padded: Any, as_loader: Any
) -> Any:
    """At most five epochs of two rollouts of two steps, with all of the callbacks at once."""
    pytest.importorskip("rich")
    pytest.importorskip("psutil")
    root, reward = tmp_path_factory.mktemp("callbacks"), Scripted()
    module = PPOModule(
        policy=make_lm("llama").double(),
        reward=reward,
        tokenizer=make_tokenizer(),
        generation=SamplingParams(max_new_tokens=3),
        updates=UpdateSchedule(minibatch=2),
        algorithm=Algorithm(shaping=()),
        optimizer=partial(torch.optim.SGD, lr=RATE),
        schedule=LinearSchedule(),
    )
    kept = ModelCheckpoint(root / "kept", monitor="eval/reward", mode="max", filename="{epoch}")
    frequent = ModelCheckpoint(root / "frequent", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    stopping = EarlyStopping("eval/reward", mode="max", patience=2)
    weights, bar = Weights(), RichProgressBar()
    others = [LearningRateMonitor(), DeviceStatsMonitor(cpu_stats=True), Export(str(root / "policy")), weights, reward]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true",
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        logger=CSVLogger(root, name="logs", version=0),
        callbacks=[kept, frequent, stopping, bar, *others],
    )
    batches = [{"prompts": left_padded([[12, 13], [10], [14, 15, 16], [17]])}] * 2
    trainer.fit(module, as_loader(batches), as_loader([batches[0]["prompts"]]))
    with open(root / "logs/version_0/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return SimpleNamespace(
        root=root, module=module, trainer=trainer, kept=kept, stopping=stopping, weights=weights, bar=bar, rows=rows
    )


def column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row[name]]


def test_early_stopping_stops_after_two_worse_validations(ran: Any) -> None:
    assert column(ran.rows, "eval/reward") == HELD_OUT[:4]
    assert ran.stopping.stopped_epoch == 3
    assert ran.module.iteration == 8 < 2 * EPOCHS


def test_model_checkpoint_keeps_the_best(ran: Any) -> None:
    assert float(ran.kept.best_model_score) == max(HELD_OUT[:4])
    assert [path.name for path in (ran.root / "kept").iterdir()] == ["epoch=1.ckpt"]
    saved = torch.load(ran.kept.best_model_path, weights_only=True)
    assert saved["rlhf"]["iteration"] == 4
    for name, weight in ran.weights.after[1].items():
        assert torch.equal(saved["state_dict"][f"policy.{name}"], weight)
    assert any(not torch.equal(weight, ran.weights.after[0][name]) for name, weight in ran.weights.after[1].items())


def test_model_checkpoint_counts_optimizer_steps(ran: Any) -> None:
    """A rollout takes two; it saves at the first rollout's end at which the number is due."""
    names = sorted(int(path.stem.removeprefix("step=")) for path in (ran.root / "frequent").iterdir())
    assert names == [2, 4, 6, 8, 10, 12, 14, 16]


def test_learning_rate_monitor_logs_the_schedule(ran: Any) -> None:
    """Linear to nothing over ten planned rollouts, of which eight ran; it says what the library's own `lr` says."""
    expected = [RATE * (1 - rollout / 10) for rollout in range(8)]
    assert column(ran.rows, "lr") == pytest.approx(expected)
    (name,) = (name for name in ran.rows[0] if name.startswith("lr-SGD"))
    assert column(ran.rows, name) == pytest.approx(expected)


def test_device_stats_monitor_logs_each_rollout(ran: Any) -> None:
    (name,) = (name for name in ran.rows[0] if name.endswith("on_train_batch_end/cpu_vm_percent"))
    assert len(column(ran.rows, name)) == 8
    assert all(0 < percent <= 100 for percent in column(ran.rows, name))


def test_rich_progress_bar_shows_score_and_kl(ran: Any) -> None:
    shown = ran.bar.get_metrics(ran.trainer, ran.module)
    assert float(shown["score"]) == pytest.approx(column(ran.rows, "objective/scores")[-1], abs=1e-3)
    assert "kl" in shown


# The exported policy in `transformers.pipeline`


def continued(network: Any, tokens: list[int], count: int) -> list[int]:
    """The likeliest next token that is no end, again and again, without a cache."""
    given = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens = [*tokens, 1 + int(network(torch.tensor([tokens])).logits[0, -1, 1:].argmax())]
    return tokens[given:]


@pytest.mark.parametrize("prompt", ["a b", CHAT], ids=["text", "chat"])
def test_pipeline_continues_a_prompt(ran: Any, make_tokenizer: Any, prompt: Any) -> None:
    """With the trained weights, by the chat template that went along."""
    asked = pipeline("text-generation", model=str(ran.root / "policy"), device="cpu")
    found = asked(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_full_text=False)
    tokenizer = make_tokenizer()
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **AS_TEXT)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert len(tokens) == (
        2 if isinstance(prompt, str) else 7
    )  # <|im_start|> user a b <|im_end|> <|im_start|> assistant
    network = ran.module.policy.network.eval()
    expected = tokenizer.decode(continued(network, tokens, 3), skip_special_tokens=True)
    assert found[0]["generated_text"].split() == expected.split()
    assert expected.split()
