"""`GradientNorms` sees both gradients of PPO-ptx, and the run goes on as without it."""

from __future__ import annotations

import csv
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.nn.functional import cross_entropy

from lightning_rlhf import GradientNorms, PPOModule, SamplingParams, UpdateSchedule
from lightning_rlhf.core import Algorithm, ConstantSchedule

GAMMA = 0.3
PROMPTS, TEXTS = [[12, 13], [10], [14, 15, 16, 11], [17]], [[12, 13, 14, 0], [10, 11, 0], [15, 16, 17], [18, 19]]
NORMS = ["policy/rl_grad_norm", "ptx/grad_norm", "ptx/grad_norm_ratio"]


class Steps(GradientNorms):
    """Keeps what is logged in each rollout."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        logged = trainer.callback_metrics
        self.seen.append({name: float(logged[name]) for name in [*NORMS, "policy/grad_norm"] if name in logged})


def vowels(prompts, responses):
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


@pytest.fixture
def fitted(make_lm, make_tokenizer, as_loader, left_padded, right_padded):
    """A policy after a run, and the run's trainer."""

    def fit(*callbacks, ptx_coef: float = GAMMA, rollouts: int = 1, log=False, **updates) -> tuple[PPOModule, Trainer]:
        torch.manual_seed(0)
        module = PPOModule(
            make_lm(end=list(range(10))),
            vowels,
            tokenizer=make_tokenizer(),
            generation=SamplingParams(max_new_tokens=5),
            updates=UpdateSchedule(max_grad_norm=None, **updates),
            algorithm=Algorithm(ptx_coef=ptx_coef),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            schedule=ConstantSchedule(),
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=log,
            log_every_n_steps=1,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, as_loader([{"prompts": left_padded(PROMPTS), "pretrain": right_padded(TEXTS)}] * rollouts))
        return module, trainer

    return fit


def text_gradient(network, texts: list[list[int]]) -> float:
    """‖∇ γ·mean −log π‖, text by text."""
    losses = []
    for text in texts:
        logits = network.eval()(torch.tensor([text])).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.tensor(text[1:]), reduction="none"))
    loss = GAMMA * torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return float(torch.cat([g.flatten() for g in gradients if g is not None]).norm())


@pytest.mark.parametrize("updates", [{}, {"microbatch": 3}, {"epochs": 2, "microbatch": 1}], ids=str)
def test_norms_are_those_of_each_term_alone(fitted, make_lm, updates):
    callback = Steps()
    fitted(callback, **updates)
    (seen,) = callback.seen
    _, alone = fitted(ptx_coef=0.0)
    rewards = float(alone.callback_metrics["policy/grad_norm"])
    texts = text_gradient(make_lm(end=list(range(10))), TEXTS)
    assert seen["policy/rl_grad_norm"] == pytest.approx(rewards, rel=1e-5)
    assert seen["ptx/grad_norm"] == pytest.approx(texts, rel=1e-5)
    assert seen["ptx/grad_norm_ratio"] == pytest.approx(texts / rewards, rel=1e-5)


def test_texts_are_those_of_the_first_minibatch(fitted, make_lm):
    callback = Steps()
    fitted(callback, minibatch=2)
    first, whole = (text_gradient(make_lm(end=list(range(10))), TEXTS[:count]) for count in (2, 4))
    assert callback.seen[0]["ptx/grad_norm"] == pytest.approx(first, rel=1e-5)
    assert abs(first - whole) > 1e-2 * whole


def test_run_goes_on_as_without_it(fitted):
    with_it, _ = fitted(GradientNorms(), rollouts=2, minibatch=2, microbatch=1)
    without, _ = fitted(rollouts=2, minibatch=2, microbatch=1)
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_measures_every_so_many_rollouts(fitted):
    callback = Steps(2)
    fitted(callback, rollouts=3)
    first, second, third = ([step[name] for name in NORMS] for step in callback.seen)
    assert first == second != third  # `callback_metrics` keeps the last


def test_rows_of_other_rollouts_hold_nothing(fitted, tmp_path):
    callback, log = Steps(2), CSVLogger(tmp_path, name="", version="")
    fitted(callback, rollouts=4, log=log)
    with (tmp_path / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [bool(row["policy/grad_norm"]) for row in rows] == [True] * 4
    for name in NORMS:
        assert [row[name] and float(row[name]) for row in rows] == [
            pytest.approx(callback.seen[0][name]),
            "",
            pytest.approx(callback.seen[2][name]),
            "",
        ]


def test_nothing_is_measured_without_texts_or_gradients(fitted, caplog):
    callback = Steps()
    fitted(callback, ptx_coef=0.0)
    assert callback.seen[0].keys() == {"policy/grad_norm"}
    assert "measures nothing: this PPOModule has no `algorithm.ptx_coef` above 0" in caplog.text
    engine = SimpleNamespace(strategy=DeepSpeedStrategy.__new__(DeepSpeedStrategy), is_global_zero=True)
    callback.on_fit_start(engine, SimpleNamespace(algorithm=Algorithm(ptx_coef=1.0)))
    callback.on_train_batch_start(engine, SimpleNamespace(iteration=0), {"pretrain": None}, 0)
    assert "measures nothing: DeepSpeed's engine keeps the gradients" in caplog.text


def test_negative_periods_are_refused():
    with pytest.raises(ValueError, match="`every` counts rollouts and must be at least 1: got 0"):
        GradientNorms(0)
