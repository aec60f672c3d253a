import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import Clip, KLPenalty, Surrogate

TIGHT = {"rtol": 0, "atol": 1e-9}


def loss_and_gradient(surrogate, ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    out = surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out.loss.sum(), log_ratio)
    return out.loss.item(), gradient.item(), {name: stat.item() for name, stat in out.stats.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # loss = −min(ρA, clip(ρ, 0.8, 1.2)A); d loss/d log ρ = −ρA where not clipped
        (1.5, 2.0, -2.4, 0.0, 1.0),  # min(3, 2.4): above the bound and good, stop
        (1.5, -2.0, 3.0, 3.0, 0.0),  # min(−3, −2.4): above the bound and bad, come back
        (0.5, 2.0, -1.0, -1.0, 0.0),  # min(1, 1.6): below the bound and good, come back
        (0.5, -2.0, 1.6, 0.0, 1.0),  # min(−1, −1.6): below the bound and bad, stop
        (1.1, 2.0, -2.2, -2.2, 0.0),  # between the bounds
        (0.9, -2.0, 1.8, 1.8, 0.0),
        (1.0, 2.0, -2.0, -2.0, 0.0),  # both branches tie: the whole gradient, not half
        (1.0, -2.0, 2.0, 2.0, 0.0),
        (1.5, 0.0, 0.0, 0.0, 0.0),  # no advantage, nothing to clip
    ],
)
def test_clip_equals_hand_values(ratio, advantage, loss, gradient, clipped):
    got_loss, got_gradient, stats = loss_and_gradient(Clip(epsilon=0.2), ratio, advantage)
    assert abs(got_loss - loss) <= 1e-9
    assert abs(got_gradient - gradient) <= 1e-9
    assert stats == {"policy/clipfrac_avg": clipped}


def test_clip_is_never_above_the_plain_objective_and_ends_with_epsilon(float64):
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64).unsqueeze(0)
    for advantage in (1.5, -1.5):
        advantages = torch.full_like(log_ratio, advantage)
        plain = -log_ratio.exp() * advantages
        assert (Clip(epsilon=0.2)(log_ratio, advantages).loss >= plain - 1e-12).all()
        assert (Clip(epsilon=0.2)(log_ratio, advantages).loss > plain + 0.1).any()
        # ε → ∞ is the plain ρÂ
        wide = Clip(epsilon=1e6)(log_ratio, advantages)
        assert_close(wide.loss, plain, **TIGHT)
        assert wide.stats["policy/clipfrac_avg"].eq(0).all()


def test_clip_moves_with_epsilon():
    # ρ = 1.5, A = 1: 1 + ε while ε < 0.5
    for epsilon, expected in ((0.1, -1.1), (0.3, -1.3), (0.6, -1.5)):
        assert abs(loss_and_gradient(Clip(epsilon=epsilon), 1.5, 1.0)[0] - expected) <= 1e-9


def test_surrogate_defaults_are_the_published_ones():
    # ε = 0.2 (PPO, Ouyang et al. 2022 C.4); b starts at 1 with a target of 0.01 nats per action
    assert Clip() == Clip(epsilon=0.2)
    assert KLPenalty() == KLPenalty(coef=1.0, target=0.01)


def test_clip_does_not_adapt():
    clip = Clip(epsilon=0.1)
    assert clip.adapted(100.0) is clip
    assert not clip.adaptive
    assert clip.state() == {}


def test_kl_penalty_equals_hand_values():
    # ρ = 1.5, A = 2, b = 3: −ρA + b(ρ − 1 − log ρ) = −3 + 3(0.5 − log 1.5); d/d log ρ = −ρA + b(ρ − 1) = −3 + 1.5
    surrogate = KLPenalty(coef=3.0, target=None)
    loss, gradient, stats = loss_and_gradient(surrogate, 1.5, 2.0)
    penalty = 3 * (0.5 - math.log(1.5))
    assert abs(loss - (-3 + penalty)) <= 1e-9
    assert abs(gradient - (-1.5)) <= 1e-9
    assert list(stats) == ["policy/kl_penalty"]
    assert abs(stats["policy/kl_penalty"] - penalty) <= 1e-9
    # ρ = 0.5, A = −1, b = 3: 0.5 + 3(−0.5 + log 2); gradient 0.5 + 3(−0.5) = −1
    loss, gradient, _ = loss_and_gradient(surrogate, 0.5, -1.0)
    assert abs(loss - (0.5 + 3 * (math.log(2) - 0.5))) <= 1e-9
    assert abs(gradient - (-1.0)) <= 1e-9


def test_kl_penalty_holds_back_in_both_directions():
    # the penalty's gradient in log ρ is b(ρ − 1): against the move, whichever way it went
    for ratio, expected in ((1.5, 0.5), (0.5, -0.5)):
        assert abs(loss_and_gradient(KLPenalty(coef=1.0), ratio, 0.0)[1] - expected) <= 1e-9


@pytest.mark.parametrize("coef", [0.5, 1.0, 100.0])
def test_penalty_has_no_value_and_no_gradient_at_ratio_one(coef):
    loss, gradient, stats = loss_and_gradient(KLPenalty(coef=coef), 1.0, 2.0)
    assert (loss, gradient, stats["policy/kl_penalty"]) == (-2.0, -2.0, 0.0)
    # negative control: away from ratio 1 the coefficient shows
    assert abs(loss_and_gradient(KLPenalty(coef=coef), 1.5, 2.0)[1] - (-3.0)) > 0.2


def test_kl_penalty_with_coef_zero_is_the_plain_ratio():
    loss, gradient, stats = loss_and_gradient(KLPenalty(coef=0.0, target=None), 1.5, 2.0)
    assert abs(loss + 3.0) <= 1e-9
    assert abs(gradient + 3.0) <= 1e-9
    assert stats["policy/kl_penalty"] == 0.0


def test_kl_penalty_is_the_kl_from_old_to_new_in_expectation():
    # π_old and π_θ over three actions, enumerated: E_old[k3] = KL(π_old‖π_θ), gradient included
    old = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    penalty = KLPenalty(coef=2.0)((new - old.log()).unsqueeze(0), torch.zeros(1, 3, dtype=torch.float64)).loss
    got = (old * penalty).sum()
    expected = 2 * (old * (old.log() - logits.log_softmax(0))).sum()
    assert_close(got, expected, **TIGHT)
    (slope,) = torch.autograd.grad(got, logits)
    assert_close(slope, torch.autograd.grad(expected, logits)[0], **TIGHT)
    # negative control: KL(π_θ‖π_old) has another gradient
    other = 2 * (logits.softmax(0) * (logits.log_softmax(0) - old.log())).sum()
    assert (slope - torch.autograd.grad(other, logits)[0]).abs().max() > 0.01


def test_kl_penalty_halves_doubles_or_keeps_at_the_thresholds():
    # target 3: below 3/1.5 = 2 halve, above 3·1.5 = 4.5 double, the thresholds themselves keep (PPO §4)
    surrogate = KLPenalty(coef=1.0, target=3.0)
    for kl_old, coef in ((0.0, 0.5), (1.999, 0.5), (2.0, 1.0), (3.0, 1.0), (4.5, 1.0), (4.501, 2.0), (1e9, 2.0)):
        assert surrogate.adapted(kl_old).coef == coef
        assert surrogate.adapted(kl_old).target == 3.0
    assert surrogate.coef == 1.0
    with pytest.raises(FrozenInstanceError):
        surrogate.coef = 2.0


def test_kl_penalty_adapts_from_its_successor():
    moved = KLPenalty(coef=1.0, target=3.0)
    for _ in range(3):
        moved = moved.adapted(10.0)
    assert moved.coef == 8.0
    assert moved.adapted(0.0).coef == 4.0


def test_kl_penalty_without_target_is_fixed():
    fixed = KLPenalty(coef=2.0, target=None)
    assert not fixed.adaptive
    assert KLPenalty(coef=2.0, target=0.1).adaptive
    for kl_old in (0.0, 1.0, 1e9):
        assert fixed.adapted(kl_old).coef == 2.0


def test_kl_penalty_state_round_trip():
    moved = KLPenalty(coef=1.0, target=3.0).adapted(10.0)
    assert moved.state() == {"coef": 2.0}
    assert KLPenalty(coef=1.0, target=3.0).restored(moved.state()) == moved
    assert KLPenalty(coef=1.0, target=5.0).restored(moved.state()) == KLPenalty(coef=2.0, target=5.0)


def test_surrogates_refuse_the_state_of_another_class():
    with pytest.raises(ValueError, match=r"the checkpoint holds \['coef'\] for Clip, which needs \[\]"):
        Clip().restored(KLPenalty().state())
    with pytest.raises(ValueError, match=r"the checkpoint holds \[\] for KLPenalty, which needs \['coef'\]"):
        KLPenalty().restored(Clip().state())


def test_surrogates_refuse_numbers_out_of_range():
    for bad in (0.0, -0.2, float("nan")):
        with pytest.raises(ValueError, match="`epsilon` must be a number above 0: got"):
            Clip(epsilon=bad)
        with pytest.raises(ValueError, match="`target` must be a number above 0: got"):
            KLPenalty(target=bad)
    with pytest.raises(ValueError, match="`coef` must be a number of at least 0: got -1"):
        KLPenalty(coef=-1.0)
    with pytest.raises(ValueError, match="`coef`=0 can't adapt: doubling 0 gives 0; set `target` to None"):
        KLPenalty(coef=0.0)


@pytest.mark.parametrize("surrogate", [Clip(), KLPenalty()])
def test_statistics_carry_no_gradient_and_the_shape_of_the_loss(float64, surrogate):
    out = surrogate(float64([[0.1, -0.5, 0.4]], requires_grad=True), float64([[1.0, -1.0, 2.0]]))
    assert out.loss.shape == (1, 3)
    assert out.loss.requires_grad
    for stat in out.stats.values():
        assert stat.shape == (1, 3)
        assert not stat.requires_grad


def test_surrogate_is_abstract():
    with pytest.raises(TypeError):
        Surrogate()
