import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import CISPO, Clip, ImportanceSampling, KLPen, MaskedIS, MismatchIS, TruncatedIS

TIGHT = {"rtol": 0, "atol": 1e-9}


def weights(surrogate, *ratios):
    mismatch = torch.tensor([[math.log(w) for w in ratios]], dtype=torch.float64)
    return surrogate.weights(mismatch).squeeze(0).tolist()


def test_truncated_weights_equal_hand_values():
    # min(w, 2): small weights are kept, only large ones cost variance
    got = weights(TruncatedIS(cap=2.0), 0.01, 0.5, 1.0, 1.9, 2.1, 50.0)
    assert got == pytest.approx([0.01, 0.5, 1.0, 1.9, 2.0, 2.0], rel=0, abs=1e-9)


def test_masked_weights_equal_hand_values():
    # w in [0.5, 2], else 0: at both ends an action is dropped and not held at the bound
    got = weights(MaskedIS(smallest=0.5, largest=2.0), 0.01, 0.49, 0.51, 1.0, 1.99, 2.01, 50.0)
    assert got == pytest.approx([0.0, 0.0, 0.51, 1.0, 1.99, 0.0, 0.0], rel=0, abs=1e-9)
    # negative control: the truncation of the same numbers
    assert weights(TruncatedIS(cap=2.0), 0.01, 50.0) == pytest.approx([0.01, 2.0], rel=0, abs=1e-9)


@given(st.lists(st.floats(-4, 4), min_size=1, max_size=6), st.floats(0.1, 20), st.floats(0, 1), st.floats(1.01, 20))
@settings(deadline=None, max_examples=30)
def test_weights_equal_naive_scalars(mismatch, cap, smallest, largest):
    x = torch.tensor([mismatch], dtype=torch.float64)
    ratios = [math.exp(value) for value in mismatch]
    truncated = TruncatedIS(cap=cap).weights(x).squeeze(0).tolist()
    assert truncated == pytest.approx([w if w < cap else cap for w in ratios], rel=0, abs=1e-9)
    masked = MaskedIS(smallest=smallest, largest=largest).weights(x).squeeze(0).tolist()
    assert masked == pytest.approx([w if smallest <= w <= largest else 0.0 for w in ratios], rel=0, abs=1e-9)


def test_no_mismatch_weighs_one(float64):
    for surrogate in (TruncatedIS(), MaskedIS(), TruncatedIS(surrogate=CISPO())):
        assert torch.equal(surrogate.weights(torch.zeros(2, 3, dtype=torch.float64)), float64([[1.0] * 3] * 2))


def test_each_argument_moves_the_weights_or_the_loss(float64):
    assert [weights(TruncatedIS(cap=cap), 9.0)[0] for cap in (2.0, 3.0)] == [2.0, 3.0]
    assert [weights(MaskedIS(smallest=s), 0.3)[0] > 0 for s in (0.2, 0.5)] == [True, False]
    assert [weights(MaskedIS(largest=x), 3.0)[0] > 0 for x in (4.0, 2.0)] == [True, False]
    # ρ = 2, A = 1: Clip −1.2, plain −2
    x, a = float64([[math.log(2)]]), float64([[1.0]])
    for kind in (TruncatedIS, MaskedIS):
        for inner, loss in ((Clip(), -1.2), (ImportanceSampling(), -2.0), (Clip(epsilon=0.5), -1.5)):
            assert_close(kind(surrogate=inner)(x, a).loss, float64([[loss]]), **TIGHT)


@pytest.mark.parametrize("kind", [TruncatedIS, MaskedIS])
def test_loss_and_statistics_are_those_of_the_inner_surrogate(float64, kind):
    # the weight is applied by whoever knows the sampler, once
    x, a = float64([[math.log(1.5), math.log(0.5)]]), float64([[2.0, -2.0]])
    out = kind(surrogate=Clip(epsilon=0.2))(x, a)
    assert_close(out.loss, float64([[-2.4, 1.6]]), **TIGHT)
    assert_close(out.stats, {"policy/clipfrac_avg": float64([[1.0, 1.0]])}, **TIGHT)
    out = kind(surrogate=KLPen(coef=3.0))(x, a)
    assert_close(out.stats["policy/kl_penalty"][0, 0], float64(3 * (0.5 - math.log(1.5))), **TIGHT)


@pytest.mark.parametrize("kind", [TruncatedIS, MaskedIS])
def test_adaptation_and_state_are_those_of_the_inner_surrogate(kind):
    weighted = kind(surrogate=KLPen(coef=1.0, target=3.0))
    assert weighted.adaptive
    assert weighted.state() == {"surrogate.coef": 1.0}
    assert weighted.adapted(10.0) == kind(surrogate=KLPen(coef=2.0, target=3.0))
    assert weighted.adapted(0.0) == kind(surrogate=KLPen(coef=0.5, target=3.0))
    assert weighted.surrogate.coef == 1.0
    assert weighted.adapted(10.0).state() == {"surrogate.coef": 2.0}
    assert weighted.restored({"surrogate.coef": 8.0}) == kind(surrogate=KLPen(coef=8.0, target=3.0))
    with pytest.raises(ValueError, match=r"the checkpoint holds \['coef'\] for .*, which needs \['surrogate.coef'\]"):
        weighted.restored({"coef": 8.0})
    # negative control: nothing adapts where nothing moves
    for inner in (Clip(), KLPen(coef=1.0, target=None)):
        assert not kind(surrogate=inner).adaptive
        assert kind(surrogate=inner).state() == {}
        assert kind(surrogate=inner).adapted(10.0) == kind(surrogate=inner)


def test_adapted_keeps_the_bounds():
    inner = KLPen(coef=1.0, target=3.0)
    assert TruncatedIS(cap=7.0, surrogate=inner).adapted(10.0).cap == 7.0
    masked = MaskedIS(smallest=0.1, largest=9.0, surrogate=inner).adapted(10.0)
    assert (masked.smallest, masked.largest) == (0.1, 9.0)


def test_state_of_nested_weights_carries_the_whole_path():
    nested = TruncatedIS(surrogate=MaskedIS(surrogate=KLPen(coef=1.0, target=3.0)))
    assert nested.state() == {"surrogate.surrogate.coef": 1.0}
    assert nested.adaptive
    moved = nested.adapted(10.0)
    assert moved.surrogate.surrogate.coef == 2.0
    assert nested.restored(moved.state()) == moved


def test_truncated_and_masked_together_count_w_once():
    # w = 1.5 is inside both bounds, w = 9 and w = 0.1 are outside the inner one; E_sampler[w²·loss] is not E_old[loss]
    both = TruncatedIS(cap=3.0, surrogate=MaskedIS(smallest=0.5, largest=2.0))
    assert weights(both, 1.5, 9.0, 0.1) == pytest.approx([1.5, 0.0, 0.0], rel=0, abs=1e-9)


def test_mismatch_weights_is_abstract():
    with pytest.raises(TypeError):
        MismatchIS()


def test_extreme_mismatches_give_finite_weights():
    x = torch.tensor([[-1e4, -90.0, 90.0, 1e4]])
    # 1e-30: e⁻⁹⁰ is 8e-40
    assert_close(TruncatedIS(cap=2.0).weights(x), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), rtol=0, atol=1e-30)
    assert torch.equal(MaskedIS().weights(x), torch.zeros(1, 4))
    assert TruncatedIS(cap=1e30).weights(x).isfinite().all()


def test_weights_refuse_numbers_out_of_range():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`cap` must be a number above 0: got"):
            TruncatedIS(cap=bad)
        with pytest.raises(ValueError, match="`largest` must be a number above 0: got"):
            MaskedIS(largest=bad)
    for bad in (-0.1, 2.0, 3.0, float("nan")):
        with pytest.raises(ValueError, match=r"`smallest` must lie in \[0, largest\): got"):
            MaskedIS(smallest=bad, largest=2.0)
