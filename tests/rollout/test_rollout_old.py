"""Where log π_old comes from: what is chosen, what is refused, and what it costs."""

from __future__ import annotations

import itertools

import pytest
import torch

from lightning_rlhf.rollout import RecomputedLogprobs, SamplerLogprobs, UpdateLogprobs
from lightning_rlhf.rollout.old_logprobs import Situation, choose


def situation(full: bool, one: bool, epochs: int) -> Situation:
    return Situation(full_precision=full, one_step=one, epochs=epochs)


@pytest.mark.parametrize(
    ("full", "one", "epochs", "expected"),
    [
        (True, True, 1, SamplerLogprobs),
        (True, False, 1, SamplerLogprobs),
        (True, False, 4, RecomputedLogprobs),
        (False, True, 1, UpdateLogprobs),
        (False, False, 1, RecomputedLogprobs),
        (False, False, 4, RecomputedLogprobs),
        (True, False, 0, SamplerLogprobs),  # evaluation
        (False, False, 0, RecomputedLogprobs),
    ],
)
def test_cheapest_exact_source_is_chosen(full, one, epochs, expected):
    assert type(choose(None, situation(full, one, epochs))) is expected


@pytest.mark.parametrize(("full", "one"), itertools.product([True, False], repeat=2))
def test_settings_are_kept_or_refused(full, one):
    where = situation(full, one, 1)
    assert choose(RecomputedLogprobs(), where) == RecomputedLogprobs()
    for setting, serves in ((SamplerLogprobs(), full), (UpdateLogprobs(), one)):
        if serves:
            assert choose(setting, where) == setting
        else:
            with pytest.raises(
                ValueError, match=f"`updates.old_logprobs`={type(setting).__name__}.*take RecomputedLogprobs"
            ):
                choose(setting, where)


def test_a_setting_for_training_does_not_bind_evaluation():
    assert choose(UpdateLogprobs(), situation(False, False, 0)) == RecomputedLogprobs()


def test_sources_give_the_tokens_their_logprobs(make_rollout):
    rollout = make_rollout([[10, 11]], [[12, 13, 0]])
    weight = torch.tensor(2.0, requires_grad=True)

    def measure(x):
        return weight * x.response_mask.float()

    captured = SamplerLogprobs()(rollout, measure, measure)
    assert captured.logprobs is rollout.sampler_logprobs
    assert captured.logprobs_with_grad is None
    recomputed = RecomputedLogprobs()(rollout, measure, measure)
    assert recomputed.logprobs.tolist() == [[2.0, 2.0, 2.0]]
    assert not recomputed.logprobs.requires_grad
    assert recomputed.logprobs_with_grad is None
    live = UpdateLogprobs()(rollout, None, measure)
    assert live.logprobs.tolist() == [[2.0, 2.0, 2.0]]
    assert not live.logprobs.requires_grad
    assert torch.autograd.grad(live.logprobs_with_grad.sum(), weight)[0] == 3.0
