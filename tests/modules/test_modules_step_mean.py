"""Accumulated gradients are those of the large batch, whatever the lengths."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.modules import RewardModule, SFTModule
from lightning_rlhf.types import ComparisonBatch

TEXTS = [[12, 13, 0], [12, 14, 15, 16, 17, 18, 19, 20, 21, 0], [10, 11, 0], [14, 15, 16, 0], [18, 12, 13, 14, 15, 0]]
LR = 0.1


@pytest.fixture
def sft(make_lm, make_trainer, as_loader, right_padded):
    """Weights after one epoch, and the loss that was logged last."""

    def train(sizes: list[int], **options) -> tuple[torch.Tensor, float]:
        module = SFTModule(make_lm().double(), optimizer=partial(torch.optim.SGD, lr=LR), schedule=ConstantSchedule())
        batches, start = [], 0
        for size in sizes:
            batches.append(right_padded(TEXTS[start : start + size]))
            start += size
        trainer = make_trainer(**options)
        trainer.fit(module, as_loader(batches))
        weights = torch.cat([p.flatten() for p in module.parameters()]).detach()
        return weights, float(trainer.callback_metrics["train/loss"])

    return train


def relative(one: torch.Tensor, other: torch.Tensor, start: torch.Tensor) -> float:
    return float((one - other).norm() / (other - start).norm())


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulated_batches_are_one_step_of_all_their_tokens(sft, make_lm, clip):
    start = torch.cat([p.flatten() for p in make_lm().double().parameters()])
    whole, loss = sft([2], gradient_clip_val=clip)
    parts, accumulated = sft([1, 1], accumulate_grad_batches=2, gradient_clip_val=clip)
    assert relative(parts, whole, start) < 1e-12
    assert accumulated == pytest.approx(loss, rel=1e-6)
    apart, _ = sft([1, 1])
    assert relative(apart, whole, start) > 0.1  # two steps are something else


def test_last_step_of_an_epoch_may_have_fewer_batches(sft, make_lm):
    start = torch.cat([p.flatten() for p in make_lm().double().parameters()])
    assert relative(sft([2, 1, 1, 1], accumulate_grad_batches=3)[0], sft([4, 1])[0], start) < 1e-12


def test_accumulation_may_begin_later(sft, make_lm):
    start = torch.cat([p.flatten() for p in make_lm().double().parameters()])
    found, _ = sft([1, 1, 2, 1], callbacks=[GradientAccumulationScheduler({0: 4})])
    assert relative(found, sft([5])[0], start) < 1e-12


def test_accumulated_comparisons_are_one_step_of_all_their_prompts(make_scorer, make_trainer, as_loader):
    """A prompt without a preference counts nowhere."""
    tokens = torch.tensor([[[12, 13, 0], [12, 14, 0]], [[15, 16, 0], [15, 17, 0]], [[18, 10, 0], [18, 11, 0]]])
    ranks = torch.tensor([[0, 1], [0, 0], [1, 0]])

    def batch(rows) -> ComparisonBatch:
        part = tokens[rows]
        unknown = torch.full(part.shape[:2], torch.nan)
        return ComparisonBatch(part, torch.ones_like(part, dtype=torch.bool), ranks[rows], unknown)

    def train(batches, **options) -> torch.Tensor:
        module = RewardModule(
            make_scorer().double(), optimizer=partial(torch.optim.SGD, lr=LR), schedule=ConstantSchedule()
        )
        make_trainer(**options).fit(module, as_loader(batches))
        return torch.cat([p.flatten() for p in module.parameters()]).detach()

    start = torch.cat([p.flatten() for p in make_scorer().double().parameters()])
    whole = train([batch([0, 1, 2])])
    assert relative(train([batch([1]), batch([0, 2])], accumulate_grad_batches=2), whole, start) < 1e-12
    assert relative(train([batch([0, 1]), batch([2])], accumulate_grad_batches=2), whole, start) < 1e-12
