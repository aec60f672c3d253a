"""MovingReference: the recursion by hand, what it refuses, what is measured after it, and its checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from lightning_rlhf.callbacks import EMA, Export, KLGuard, MovingReference, RollBack
from lightning_rlhf.core import DPO, ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.evaluation import AlignmentTax, WinRate, panel
from lightning_rlhf.models import ModelSource
from lightning_rlhf.modules import PPOModule, PreferenceModule, SFTModule
from lightning_rlhf.rollout import UpdateSchedule, responder
from lightning_rlhf.types import ComparisonBatch

peft = pytest.importorskip("peft")

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]
TEXTS = [[12, 13, 20, 21, 0], [10, 11, 0]]
ADAM = partial(torch.optim.Adam, lr=0.01)
SINGLE = {"precision": "32-true"}


class Weights(Callback):
    """Policy and reference when every batch begins and at the end, with the KL that each rollout measured."""

    def __init__(self) -> None:
        self.policy, self.reference, self.kl = [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.keep(pl_module)

    def on_train_batch_end(self, trainer, *_):
        self.kl.append(float(trainer.callback_metrics.get("objective/kl", 0)))

    def on_train_end(self, trainer, pl_module):
        self.keep(pl_module)

    def keep(self, module):
        policy = getattr(module, "policy", None) or module.model
        self.policy.append([p.detach().clone() for p in policy.parameters()])
        self.reference.append([p.detach().clone() for p in module.reference.frozen.parameters()])


def same(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def by_hand(policies, start, *, alpha, every):
    """References after each step, from the policies after each step."""
    found = [start]
    for step, policy in enumerate(policies[1:], start=1):
        before = found[-1]
        mixed = [alpha * p + (1 - alpha) * r for p, r in zip(policy, before, strict=True)]
        found.append(mixed if step % every == 0 else before)
    return found


@pytest.fixture
def fit(make_lm, make_trainer, as_loader, left_padded, right_padded, token_reward):
    """Rollouts of a policy with callbacks; the module."""

    def run(count=5, callbacks=(), *, policy=None, path=None, ckpt_path=None, val=None, trainer=None, **options):
        usual = {
            "generation": SamplingParams(max_new_tokens=4),
            "updates": UpdateSchedule(minibatch=2),
            "schedule": ConstantSchedule(),
            "optimizer": ADAM,
        }
        policy = make_lm().double() if policy is None else policy
        module = PPOModule(policy, token_reward(), **gathered(**usual | options))
        fitter = make_trainer(callbacks=list(callbacks), max_steps=-1, max_epochs=count, **(trainer or {}))
        fitter.fit(module, as_loader([{"prompts": left_padded(RAGGED)}]), val, ckpt_path=ckpt_path)
        if path is not None:
            fitter.save_checkpoint(path)
        return module

    return run


@pytest.mark.parametrize(("alpha", "every"), [(0.6, 2), (1.0, 1), (0.3, 3)])
def test_reference_follows_its_recursion_to_the_bit(fit, alpha, every):
    watch = Weights()
    fit(5, [MovingReference(alpha=alpha, every=every), watch])
    expected = by_hand(watch.policy, watch.policy[0], alpha=alpha, every=every)
    assert len(watch.reference) == 6
    assert all(same(found, wanted) for found, wanted in zip(watch.reference, expected, strict=True))
    other = by_hand(watch.policy, watch.policy[0], alpha=alpha - 0.1, every=every)
    assert not same(watch.reference[-1], other[-1])
    assert not same(watch.policy[0], watch.policy[1])
    if alpha == every == 1:
        assert all(same(*pair) for pair in zip(watch.reference, watch.policy, strict=True))


def test_reference_of_a_source_of_the_same_architecture_moves(fit, make_folder):
    watch = Weights()
    source = ModelSource(path=make_folder(seed=5), dtype="float64")
    fit(3, [MovingReference(alpha=0.5, every=1), watch], reference=source)
    assert not same(watch.reference[0], watch.policy[0])
    expected = by_hand(watch.policy, watch.reference[0], alpha=0.5, every=1)
    assert all(same(found, wanted) for found, wanted in zip(watch.reference, expected, strict=True))


def test_reference_in_bfloat16_is_mixed_in_float32(fit, make_lm):
    watch = Weights()
    fit(1, [MovingReference(alpha=0.3, every=1), watch], policy=make_lm(), reference_dtype="bfloat16", trainer=SINGLE)
    alpha, policy, before = 0.3, watch.policy[1], watch.reference[0]
    expected = [(alpha * p + (1 - alpha) * r.float()).bfloat16() for p, r in zip(policy, before, strict=True)]
    narrow = [alpha * p.bfloat16() + (1 - alpha) * r for p, r in zip(policy, before, strict=True)]
    assert same(watch.reference[1], expected)
    assert {r.dtype for r in watch.reference[1]} == {torch.bfloat16}
    assert not same(watch.reference[1], narrow)


def test_kl_falls_where_the_reference_moves(fit):
    still, moving = Weights(), Weights()
    slow = {"optimizer": partial(torch.optim.SGD, lr=0.5)}
    fit(6, [still], **slow)
    fit(6, [MovingReference(alpha=1.0, every=3), moving], **slow)
    assert still.kl[:3] == moving.kl[:3]
    assert moving.kl[3] == pytest.approx(0.0, abs=1e-12)
    assert abs(still.kl[3]) > 1e-4
    assert abs(moving.kl[4]) > 1e-9


def test_reference_follows_the_live_policy_under_ema(fit, tmp_path):
    """EMA and its export neither see the reference nor change it."""
    plain, averaged = Weights(), Weights()
    move = partial(MovingReference, alpha=0.6, every=1)
    fit(3, [move(), plain])
    ema = EMA(decay=0.5)
    fit(3, [ema, Export(str(tmp_path / "out")), move(), averaged])
    assert all(same(*pair) for pair in zip(plain.reference, averaged.reference, strict=True))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    found = dict(exported.named_parameters())
    assert all(torch.equal(found[name.removeprefix("network.")], value) for name, value in ema.average.items())
    assert not same(found.values(), averaged.reference[-1])


def test_answers_of_the_reference_are_drawn_anew_after_it_moved(fit, as_loader, left_padded, right_padded, monkeypatch):
    """Evaluations are those of a run that keeps no answers; without a move the kept ones are read."""
    drawn, logged = [], []
    draw, answer = responder.reference_rollout, panel.ReferenceAnswers.__call__

    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("eval/")})

    def counted(*args, **options):
        drawn.append(1)
        return draw(*args, **options)

    def uncached(self, *args, **options):
        self._kept = {}
        return answer(self, *args, **options)

    def run(every):
        drawn.clear()
        logged.clear()
        val = [as_loader([left_padded(RAGGED)]), as_loader([right_padded(TEXTS)])]
        evaluations = [WinRate(samples=2), AlignmentTax()]
        fit(4, [MovingReference(alpha=1.0, every=every), Watch()], val=val, evaluations=evaluations)
        return len(drawn), list(logged)

    monkeypatch.setattr(responder, "reference_rollout", counted)
    moved, after = run(2)
    still, unmoved = run(9)
    assert (moved, still) == (3, 1)  # before the first move, and after each of two
    assert after[0] == unmoved[0]
    assert after[1]["eval/alignment_tax"] == 0.0 != unmoved[1]["eval/alignment_tax"]
    monkeypatch.setattr(panel.ReferenceAnswers, "__call__", uncached)
    assert run(2)[1] == after


def test_resumed_run_has_the_moved_reference_to_the_bit(fit, make_lm, tmp_path):
    whole, rest = Weights(), Weights()
    move = partial(MovingReference, alpha=0.6, every=2)
    fit(7, [move(), whole], policy=make_lm(), trainer=SINGLE)
    first = fit(3, [move()], policy=make_lm(), path=tmp_path / "x.ckpt", trainer=SINGLE)
    assert not same(first.reference.frozen.parameters(), make_lm().parameters())
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    fit(7, [move(), rest], policy=make_lm(), ckpt_path=tmp_path / "x.ckpt", trainer=SINGLE)
    assert len(rest.reference) == 5
    for found, wanted in zip(rest.reference, whole.reference[3:], strict=True):
        assert same(found, wanted)
    assert rest.kl == whole.kl[3:]
    assert all(same(*pair) for pair in zip(rest.policy, whole.policy[3:], strict=True))


def test_checkpoint_is_evaluated_with_its_reference(
    fit, make_lm, make_trainer, as_loader, left_padded, token_reward, tmp_path
):
    fit(2, [MovingReference(alpha=1.0, every=2)], policy=make_lm(), path=tmp_path / "x.ckpt", trainer=SINGLE)
    generation = SamplingParams(max_new_tokens=4)
    module = PPOModule(make_lm(), token_reward(), generation=generation)
    found = make_trainer(**SINGLE).validate(module, as_loader([left_padded(RAGGED)]), ckpt_path=tmp_path / "x.ckpt")
    assert found[0]["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    assert not same(module.policy.parameters(), make_lm().parameters())
    assert same(module.policy.parameters(), module.reference.frozen.parameters())


def test_reference_that_never_moved_is_in_no_checkpoint(fit, tmp_path):
    fit(1, [MovingReference(every=2)], path=tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["rlhf"]["reference"] == {}


def test_roll_back_returns_to_the_reference_of_then(fit):
    """Every rollout but the first is over its budget: the third begins where the second began, reference and all."""
    watch = Weights()
    guard = KLGuard(kl=1e-6, action=RollBack(limit=9))
    move = MovingReference(alpha=0.5, every=1)
    fit(3, [move, guard, watch], optimizer=partial(torch.optim.Adam, lr=0.1))
    assert watch.kl[0] < 1e-6 < watch.kl[1]
    assert same(watch.policy[2], watch.policy[0])
    assert same(watch.reference[2], watch.reference[0])
    assert not same(watch.reference[1], watch.reference[0])


# PreferenceModule


@pytest.fixture
def fit_preferences(make_lm, make_trainer, as_loader):
    def run(epochs, callbacks, *, accumulate=1, path=None, ckpt_path=None):
        tokens = torch.tensor([[[12, 20, 0], [12, 21, 0]], [[13, 22, 0], [13, 23, 0]]])
        mask = torch.ones_like(tokens, dtype=torch.bool)
        target = mask & (torch.arange(3) > 0)
        batch = ComparisonBatch(
            tokens, mask, torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), torch.nan), target=target
        )
        module = PreferenceModule(make_lm(), DPO(beta=0.3), optimizer=ADAM, schedule=ConstantSchedule())
        fitter = make_trainer(callbacks=callbacks, max_epochs=epochs, accumulate_grad_batches=accumulate, **SINGLE)
        fitter.fit(module, as_loader([batch] * 2), ckpt_path=ckpt_path)
        if path is not None:
            fitter.save_checkpoint(path)
        return module

    return run


@pytest.mark.parametrize(("accumulate", "every"), [(1, 3), (2, 2)])
def test_reference_of_preferences_moves_with_optimizer_steps(fit_preferences, accumulate, every):
    watch = Weights()
    fit_preferences(4, [MovingReference(alpha=0.6, every=every), watch], accumulate=accumulate)
    steps = watch.policy[::accumulate]
    expected = by_hand(steps, steps[0], alpha=0.6, every=every)
    assert all(same(*pair) for pair in zip(watch.reference[::accumulate], expected, strict=True))
    assert not same(watch.reference[-1], watch.reference[0])


def test_preferences_resume_with_the_moved_reference(fit_preferences, tmp_path):
    whole, rest = Weights(), Weights()
    move = partial(MovingReference, alpha=0.6, every=2)
    fit_preferences(3, [move(), whole])
    fit_preferences(2, [move()], path=tmp_path / "x.ckpt")
    fit_preferences(3, [move(), rest], ckpt_path=tmp_path / "x.ckpt")
    assert all(same(*pair) for pair in zip(rest.reference, whole.reference[4:], strict=True))
    assert all(same(*pair) for pair in zip(rest.policy, whole.policy[4:], strict=True))


# What is refused


def test_adapter_that_is_turned_off_cannot_move(fit, make_lm):
    adapted = peft.get_peft_model(make_lm(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    with pytest.raises(ValueError, match="adapter off, which has no weights of its own"):
        fit(1, [MovingReference()], policy=adapted)


def test_teacher_of_other_shapes_cannot_move(fit, make_folder):
    with pytest.raises(
        ValueError, match=r"`network.transformer.wte.weight` is \[36, 32\] in the reference and \[36, 16\]"
    ):
        fit(1, [MovingReference()], reference=ModelSource(path=make_folder(width=32)))


def test_stage_without_a_reference_is_refused(make_lm, make_trainer, as_loader, right_padded):
    with pytest.raises(ValueError, match="needs a reference, which SFTModule has not"):
        make_trainer(callbacks=[MovingReference()]).fit(SFTModule(make_lm()), as_loader([right_padded(TEXTS)]))


def test_reference_of_another_network_is_not_restored(fit, make_lm):
    module = fit(1)
    with pytest.raises(ValueError, match="has other parameters than this run's"):
        module.reference.restore({"x": torch.zeros(1)})


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"alpha": 1.1}, {"alpha": -0.5}, {"alpha": float("nan")}, {"every": 0}]
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MovingReference(**options)
