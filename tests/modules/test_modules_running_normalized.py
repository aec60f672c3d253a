"""Running normalization of scores through PPOModule: its statistics move, resume, and leave evaluations alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_rlhf import PPOModule, SamplingParams
from lightning_rlhf.core import Algorithm, BanditAdvantage, BatchMean, ConstantSchedule, RunningNormalized
from lightning_rlhf.rewards import Reward

PROMPTS = [[12, 13], [10], [14, 15, 16, 11], [17]] * 4


class Large(Reward):
    """Scores around 1,000, spread by hundreds."""

    def __init__(self) -> None:
        self._seen: list[torch.Tensor] = []

    def __call__(self, rollout, rows):
        tokens = rollout.tokens[:, rollout.prompt_width :]
        scores = 1000 + 50 * torch.where(rollout.response_mask, tokens % 7, 0).sum(1).double()
        self._seen.append(scores)
        return scores


@pytest.fixture
def make_run(make_lm, make_trainer, as_loader, left_padded, recorder):
    def make(rollouts=4, shaping=(RunningNormalized(),), **fitting):
        module = PPOModule(
            policy=make_lm(end=[0, 1]).double(),
            reward=Large(),
            algorithm=Algorithm(shaping=shaping, advantage=BanditAdvantage(baseline=BatchMean())),
            generation=SamplingParams(max_new_tokens=5),
            optimizer=partial(torch.optim.SGD, lr=1e-4),
            schedule=ConstantSchedule(),
        )
        batch = {"prompts": left_padded(PROMPTS)}
        trainer = make_trainer(callbacks=[recorder], max_epochs=fitting.pop("epochs", 1))
        trainer.fit(module, as_loader([batch] * rollouts), as_loader([left_padded(PROMPTS)]), **fitting)
        return module, trainer

    return make


def test_scores_are_in_units_of_those_before(make_run, recorder):
    module, _ = make_run()
    *rollouts, held_out = module.reward._seen
    seen = torch.empty(0, dtype=torch.float64)
    for step, scores in zip(recorder.steps, rollouts, strict=True):
        expected = scores if len(seen) == 0 else (scores - seen.mean()) / seen.std()
        assert step["objective/scores"] == pytest.approx(float(expected.mean()), rel=1e-5)
        assert step["objective/raw_scores"] == pytest.approx(float(scores.mean()), rel=1e-6)
        assert step["objective/raw_scores_std"] == pytest.approx(float(scores.std(correction=0)), rel=1e-4)
        seen = torch.cat([seen, scores])
    (rule,) = module.algorithm.rules
    assert (rule.mean, rule.count) == (pytest.approx(float(seen.mean())), 64)
    assert float(module.trainer.callback_metrics["eval/reward"]) == pytest.approx(float(held_out.mean()), rel=1e-6)


def test_without_it_scores_stay(make_run, recorder):
    make_run(shaping=())
    assert all(step["objective/scores"] > 500 for step in recorder.steps)


def test_statistics_go_on_where_a_checkpoint_left_them(make_run, recorder, tmp_path):
    whole, _ = make_run(rollouts=2, epochs=2)
    steps = recorder.steps[:]
    _, first = make_run(rollouts=2)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    recorder.steps = []
    resumed, _ = make_run(rollouts=2, epochs=2, ckpt_path=str(tmp_path / "middle.ckpt"))
    assert resumed.algorithm.rules == whole.algorithm.rules
    found = [step["objective/scores"] for step in recorder.steps[-2:]]
    assert found == pytest.approx([step["objective/scores"] for step in steps[-2:]], rel=1e-6)
    assert max(map(abs, found)) < 10
