"""Guards: what they let pass, what they stop, and that nothing is lost."""

from __future__ import annotations

import copy
import csv
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_rlhf.callbacks import EMA, KLGuard, NonFiniteGuard, RaiseKL, RollBack, RunCheckpoint, StopTraining
from lightning_rlhf.core import AdaptiveKL, ConstantSchedule, FixedKL
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule, SFTModule
from lightning_rlhf.rewards import Reward, TimedReward
from lightning_rlhf.rewards.errors import RewardError, scored_or_told
from lightning_rlhf.rollout import UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]
TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0]]


class States(Callback):
    """Weights, Adam and average when each rollout begins, and the KL it measured."""

    def __init__(self) -> None:
        self.begun, self.kl = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        average = next((c.average for c in trainer.callbacks if isinstance(c, EMA)), {})
        adam = trainer.optimizers[0].state_dict()["state"]
        self.begun.append(copy.deepcopy([list(pl_module.policy.parameters()), adam, average, pl_module.algorithm.kl]))

    def on_train_batch_end(self, trainer, *_):
        self.kl.append(float(trainer.callback_metrics["objective/kl"]))


@pytest.fixture
def fit(make_lm, make_trainer, as_loader, left_padded, toy_tokenizer, token_reward, tmp_path, monkeypatch):
    """Rollouts of a policy with callbacks; the module."""
    monkeypatch.chdir(tmp_path)

    def run(count=4, callbacks=(), *, lr=0.01, reward=None, ckpt_path=None, epochs=1, logger=False, **options):
        usual = {
            "generation": SamplingParams(max_new_tokens=4),
            "updates": UpdateSchedule(minibatch=2),
            "schedule": ConstantSchedule(),
        }
        usual |= {"optimizer": partial(torch.optim.Adam, lr=lr), "tokenizer": toy_tokenizer}
        module = PPOModule(make_lm().double(), reward or token_reward(), **gathered(**usual | options))
        saves = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
        trainer = make_trainer(
            callbacks=list(callbacks), enable_checkpointing=saves, max_epochs=epochs, logger=logger, log_every_n_steps=1
        )
        trainer.fit(module, as_loader([{"prompts": left_padded(RAGGED)}] * count), ckpt_path=ckpt_path)
        return module

    return run


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# KL and length


def test_within_the_budget_nothing_happens(fit):
    free, guarded = fit(), fit(callbacks=[KLGuard(kl=1e6, length=100)])
    assert same(free.parameters(), guarded.parameters())


def test_stop_comes_before_the_checkpoint(fit, tmp_path):
    watch = States()
    fit(callbacks=[watch], lr=0.1)
    budget = (watch.kl[1] + watch.kl[2]) / 2
    assert watch.kl[0] < budget
    assert watch.kl[1] < budget < watch.kl[2]
    with pytest.raises(RuntimeError, match=r"rollout 2: objective/kl is .*, over its budget of .*raise the KL coef"):
        fit(callbacks=[KLGuard(kl=budget, action=StopTraining()), RunCheckpoint(str(tmp_path / "kept"))], lr=0.1)
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["rlhf"]["iteration"] == 2


@pytest.mark.parametrize("action", [StopTraining(), RollBack(limit=1)])
def test_rollout_that_ends_the_run_is_in_the_log(fit, tmp_path, action):
    guard = KLGuard(length=0.5, action=action)
    with pytest.raises(RuntimeError, match="over its budget of 0.5"):
        fit(callbacks=[guard], logger=CSVLogger(tmp_path, name=None))
    with (tmp_path / "version_0" / "metrics.csv").open() as file:
        lengths = [float(row["objective/response_length"]) for row in csv.DictReader(file)]
    assert len(lengths) == (1 if isinstance(action, StopTraining) else 2)
    assert lengths[-1] > 0.5


def test_length_has_a_budget_of_its_own(fit):
    with pytest.raises(RuntimeError, match="objective/response_length is .*, over its budget of 0.5"):
        fit(callbacks=[KLGuard(length=0.5)])


@pytest.mark.parametrize("kl", [FixedKL(coef=0.1), AdaptiveKL(coef=0.1, target=1e9, horizon=1e12)])
def test_raised_coefficient_stays_raised_after_a_resume(fit, tmp_path, kl):
    def run(count, epochs, ckpt_path=None):
        saver = RunCheckpoint(str(tmp_path / f"kept{epochs}"))
        return fit(
            count, [KLGuard(length=0.5, action=RaiseKL(2.0)), saver], beta=kl, epochs=epochs, ckpt_path=ckpt_path
        )

    assert run(2, 1).algorithm.kl.coef == pytest.approx(0.1 * 2**2)
    assert run(2, 2, str(tmp_path / "kept1" / "last.ckpt")).algorithm.kl.coef == pytest.approx(0.1 * 2**4)


def test_coefficient_of_zero_cannot_be_raised(fit):
    with pytest.raises(ValueError, match="`algorithm.beta` is 0"):
        fit(callbacks=[KLGuard(length=0.5, action=RaiseKL())], beta=FixedKL(coef=0.0))


def test_roll_back_returns_to_the_last_state_that_sampled_within_the_budget(fit):
    free = States()
    fit(6, [free], lr=0.1)
    budget = (free.kl[1] + free.kl[2]) / 2
    watch = States()
    fit(4, [watch, EMA(), KLGuard(kl=budget, action=RollBack(limit=3))], lr=0.1, beta=AdaptiveKL(coef=0.1, target=0.01))
    assert watch.kl[1] < budget < watch.kl[2]
    good, bad, after = watch.begun[1], watch.begun[2], watch.begun[3]
    assert same(good[0], after[0])
    assert not same(good[0], bad[0])
    assert good[3] == after[3] != bad[3]
    for key in good[1]:
        assert all(torch.equal(good[1][key][name], after[1][key][name]) for name in good[1][key])
    assert all(torch.equal(good[2][name], after[2][name]) for name in good[2])


def test_roll_backs_have_a_limit(fit):
    with pytest.raises(RuntimeError, match="after 2 roll-backs"):
        fit(5, [KLGuard(length=0.5, action=RollBack(limit=2))])


@pytest.mark.parametrize("budgets", [{}, {"kl": 0.0}, {"length": -1.0}])
def test_guard_without_a_budget_is_refused(budgets):
    with pytest.raises(ValueError, match="needs a budget above 0"):
        KLGuard(**budgets)


# Gradients


@pytest.fixture
def train(make_lm, make_trainer, as_loader, right_padded, tmp_path):
    """SFT of which some steps have NaN gradients; the module and Adam's step count."""

    def run(broken, **options):
        module = SFTModule(
            make_lm().double(), optimizer=partial(torch.optim.Adam, lr=0.01), schedule=ConstantSchedule()
        )
        module.configure_model()
        number = iter(range(9))

        def spoil(gradient):
            return gradient * torch.nan if next(number) in broken else gradient

        module.model.network.transformer.wpe.weight.register_hook(spoil)
        guard = NonFiniteGuard(folder=str(tmp_path / "bad"), **options)
        trainer = make_trainer(callbacks=[guard])
        trainer.fit(module, as_loader([right_padded(TEXTS)] * 4))
        return module, trainer.optimizers[0].state_dict()["state"][0]["step"], guard

    return run


def test_step_of_nan_is_left_out(train, tmp_path):
    """Three whole steps on one batch, whichever of the four is left out."""
    first, steps, guard = train({1})
    second, _, _ = train({2})
    whole, _, _ = train({})
    assert (int(steps), guard.left_out) == (3, 1)
    assert same(first.parameters(), second.parameters())
    assert not same(first.parameters(), whole.parameters())
    dump = torch.load(tmp_path / "bad" / "step-1.rank0.pt", weights_only=True)
    assert dump["parameters"] == ["model.network.transformer.wpe.weight"]
    assert dump["batch"]["tokens"].tolist() == [TEXTS[0], [*TEXTS[1], 0, 0]]


def test_batch_that_cannot_be_kept_costs_no_run(train, tmp_path, monkeypatch, caplog):
    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    _, steps, _ = train({1})
    assert int(steps) == 3
    assert list((tmp_path / "bad").iterdir()) == []
    assert "the batch could not be written ([Errno 28] No space left on device)" in caplog.text


def test_left_out_steps_have_a_limit(train):
    with pytest.raises(RuntimeError, match="gradients of step 2 are not finite, and 1 such steps were left out"):
        train({0, 2}, limit=1)


def test_ppo_goes_on_after_a_step_of_nan(fit, token_reward, tmp_path):
    class Spoil(Callback):
        def on_train_start(self, trainer, pl_module):
            number = iter(range(99))
            weight = next(pl_module.policy.parameters())
            weight.register_hook(lambda g: g * torch.inf if next(number) == 2 else g)

    module = fit(3, [Spoil(), NonFiniteGuard(folder=str(tmp_path / "bad"))])
    assert module.iteration == 3
    assert all(p.isfinite().all() for p in module.parameters())
    dump = torch.load(tmp_path / "bad" / "step-2.rank0.pt", weights_only=True)
    assert dump["batch"]["prompts"]["rows"] == [{"prompt": f"p{i}"} for i in range(4)]


# Rewards


def flaky(answer):
    """Fails, or answers wrongly, in the third rollout."""
    calls = iter(range(99))

    def reward(prompts, responses):
        return answer(responses) if next(calls) == 2 else [1.0] * len(responses)

    return reward


def raises(responses):
    raise KeyError("judge")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (raises, "KeyError: 'judge'"),
        (lambda responses: [float("nan")] * len(responses), "nan for response 0"),
        (lambda responses: [1.0] * (len(responses) + 1), r"got \(5,\) for 4"),
        (lambda responses: "good", "must return 4 numbers"),
        (lambda responses: None, "must return 4 numbers"),
    ],
)
def test_failing_reward_names_the_rollout_and_keeps_what_it_was_asked(fit, tmp_path, answer, said):
    with pytest.raises(RewardError, match=f"(?s)rollout 2: the reward failed with .*{said}.*mend the reward"):
        fit(4, [RunCheckpoint(str(tmp_path / "kept"))], reward=flaky(answer))
    assert torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)["rlhf"]["iteration"] == 2
    (path,) = tmp_path.glob("failed-rewards/rollout-2.*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["p0", "p1", "p2", "p3"]
    assert all(isinstance(record["response"], str) for record in records)


def test_hanging_reward_is_ended(fit):
    reward = TimedReward(flaky(lambda responses: time.sleep(60)), seconds=0.3)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"rollout 2: .*TimeoutError: no answer within 0.3 s"):
        fit(4, reward=reward)
    assert time.monotonic() - start < 20


def test_hanging_reward_that_catches_every_exception_is_ended(fit):
    """Also where it catches the first ring by a bare `except`."""
    caught = []

    def retrying(responses):
        while True:
            try:
                try:
                    time.sleep(0.01)
                except Exception:
                    caught.append("never")
            except BaseException:
                if caught:
                    raise
                caught.append("once")

    start = time.monotonic()
    with pytest.raises(RewardError, match=r"rollout 2: .*TimeoutError: no answer within 0.3 s"):
        fit(4, reward=TimedReward(flaky(retrying), seconds=0.3))
    assert caught == ["once"]
    assert time.monotonic() - start < 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_timed_reward_scores_as_the_one_inside(fit, token_reward):
    assert same(fit(2).parameters(), fit(2, reward=TimedReward(token_reward(), seconds=60)).parameters())


def test_reward_that_fails_elsewhere_fails_here(fit, token_reward, left_padded):
    module = fit(1)
    rollout = module.responder.respond(left_padded(RAGGED), samples=1, stream="eval", iteration=0)
    with pytest.raises(RewardError, match="rollout 7: the reward failed on another process"):
        scored_or_told(token_reward(), rollout, [{}] * 4, agreed=lambda fine: False, iteration=7, run=Path())


def test_half_of_a_surrogate_pair_is_kept_with_what_failed(fit, left_padded, tmp_path, monkeypatch):
    """As a tokenizer may write it of a cut character: what was asked is readable, and the error is the reward's."""
    monkeypatch.chdir(tmp_path)

    class Fails(Reward):
        def __call__(self, rollout, rows):
            raise KeyError("answer")

    rollout = fit(1).responder.respond(left_padded(RAGGED), samples=1, stream="eval", iteration=0)
    with pytest.raises(RewardError, match="the reward failed with KeyError: 'answer'"):
        scored_or_told(
            Fails(), rollout, [{"prompt": "a\ud83d"}] * 4, agreed=lambda fine: fine, iteration=7, run=tmp_path
        )
    (path,) = tmp_path.glob("failed-rewards/rollout-7.*.jsonl")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 4
