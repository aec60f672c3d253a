"""What does not fit is said before a response is sampled."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_rlhf import (
    GoldReward,
    PPOModule,
    SamplingParams,
    TextReward,
    TimedReward,
    UpdateSchedule,
    WeightedReward,
    WinRate,
)
from lightning_rlhf.engines import LocalEngine


def needs(prompts: list[str], responses: list[str], solution: list[str], bonus: float = 0.0) -> list[float]:
    return [float(right in response) + bonus for right, response in zip(solution, responses, strict=True)]


def fits(prompts: list[str], responses: list[str], *, answer: list[str]) -> list[float]:
    return [float(right in response) for right, response in zip(answer, responses, strict=True)]


class Needs(TextReward):
    def score(self, prompts: list[str], responses: list[str], *, solution: list[str]) -> list[float]:
        return needs(prompts, responses, solution)


def judge(prompts: list[str], first: list[str], second: list[str], solution: list[str]) -> list[float]:
    return [0.5] * len(prompts)


@pytest.fixture
def fit(make_lm: Any, make_tokenizer: Any, make_trainer: Any, as_loader: Any, left_padded: Any) -> Any:
    """One rollout of 4 responses whose rows have `prompt` and `answer`; counts the calls of the sampler."""

    def run(monkeypatch: pytest.MonkeyPatch, reward: Any, *callbacks: Callback, **options: Any) -> int:
        sampled: list[int] = []
        draw = LocalEngine.generate
        monkeypatch.setattr(
            LocalEngine, "generate", lambda self, *args, **more: sampled.append(1) or draw(self, *args, **more)
        )
        trainer = options.pop("trainer", {})
        short = {"generation": SamplingParams(max_new_tokens=3), "tokenizer": make_tokenizer()}
        module = PPOModule(make_lm(), reward, **(short | options))
        rows = [{"prompt": "a", "answer": "b"}] * 4
        prompts = left_padded([[11, 12]] * 4, rows=rows)
        try:
            make_trainer(**trainer).fit(module, as_loader([{"prompts": prompts}]), as_loader([prompts]))
        finally:
            run.sampled = len(sampled)
        return len(sampled)

    return run


REWARDS = {
    "function": needs,
    "class": Needs(),
    "timed": TimedReward(needs),
    "weighted": WeightedReward({"fits": fits, "needs": Needs()}),
}


@pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)
def test_column_that_the_data_lack_is_named(fit: Any, reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"(needs|Needs) needs solution, but the rows have answer, prompt"):
        fit(monkeypatch, reward)
    assert fit.sampled == 0


@pytest.mark.parametrize(
    ("evaluation", "source"),
    [(GoldReward(reward=needs), "needs"), (WinRate(judge=judge), "the judge of `win_rate`")],
)
def test_column_that_an_evaluation_lacks_is_named(
    fit: Any, evaluation: Any, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"{source} needs solution, but the rows have answer, prompt"):
        fit(monkeypatch, fits, evaluations=[evaluation], trainer={"num_sanity_val_steps": 1})
    assert fit.sampled == 0


def test_column_that_is_there_is_taken(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(monkeypatch, fits) > 0


def test_minibatch_that_does_not_divide_the_rollout_is_refused(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="minibatch=3 for 4 sequences"):
        fit(monkeypatch, fits, updates=UpdateSchedule(minibatch=3))
    assert fit.sampled == 0


@pytest.mark.parametrize(
    ("setting", "instead"),
    [({"gradient_clip_val": 1.0}, "max_grad_norm"), ({"accumulate_grad_batches": 2}, "batch_size")],
)
def test_setting_of_the_trainer_is_refused_with_what_to_use(
    fit: Any, setting: dict[str, Any], instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"`trainer.{next(iter(setting))}`.*{instead}"):
        fit(monkeypatch, fits, trainer=setting)
    assert fit.sampled == 0
