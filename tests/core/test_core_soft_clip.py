import math

import pytest
import torch
from torch.testing import assert_close

from lightning_rlhf.core import SAPO, VESPO, Clip, ImportanceSampling

TIGHT = {"rtol": 0, "atol": 1e-9}


def loss_and_gradient(surrogate, ratio, advantage):
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    loss = surrogate(log_ratio, torch.tensor([[advantage]], dtype=torch.float64)).loss
    return loss.item(), torch.autograd.grad(loss.sum(), log_ratio)[0].item()


@pytest.mark.parametrize("ratio", [0.01, 0.5, 0.999, 1.0, 1.3, 4.0])
@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 0.7), (-3.0, 1.4)])
def test_sapo_equals_scalars(ratio, advantage, tau):
    p = 1 / (1 + math.exp(-tau * (ratio - 1)))
    found = loss_and_gradient(SAPO(temperature_positive=0.7, temperature_negative=1.4), ratio, advantage)
    assert found == pytest.approx((-4 / tau * p * advantage, -4 * p * (1 - p) * ratio * advantage), rel=0, abs=1e-9)
    # negative control: the temperatures exchanged
    wrong = loss_and_gradient(SAPO(temperature_positive=1.4, temperature_negative=0.7), ratio, advantage)
    assert abs(wrong[0] - found[0]) > 0.01


def test_sapo_without_temperature_is_the_plain_surrogate(float64):
    # (4/τ)·σ(τy) = 2/τ + y − τ²y³/12 + …: at τ = 1e-3 and y = ρ − 1 ≤ 3 the last term is below 3e-6
    x, a = float64([[-2.0, -0.3, 0.0, 0.4, 1.3]], requires_grad=True), float64([[1.0, -2.0, 0.5, 1.5, -1.0]])
    soft, plain = SAPO(temperature_positive=1e-3, temperature_negative=1e-3)(x, a).loss, ImportanceSampling()(x, a).loss
    assert_close(soft + 2 / 1e-3 * a, plain + a, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in (soft, plain)]
    assert_close(*gradients, rtol=0, atol=1e-4)
    # negative control: at the paper's temperature it is another loss
    paper = torch.autograd.grad(SAPO()(x, a).loss.sum(), x)[0]
    assert (paper - gradients[1]).abs().max() > 0.1


def test_sapo_fades_out_where_clip_stops():
    for ratio, advantage in ((1.5, 1.0), (0.5, -1.0)):
        assert loss_and_gradient(Clip(), ratio, advantage)[1] == 0.0
        slopes = [abs(loss_and_gradient(SAPO(), r, advantage)[1] / r) for r in (1.0, ratio, ratio**3, ratio**5)]
        assert slopes == sorted(slopes, reverse=True)
        assert 0 < slopes[-1] < slopes[0] == pytest.approx(1.0, abs=1e-12)


def test_vespo_equals_scalars():
    surrogate = VESPO(k_positive=2.0, lambda_positive=3.0, k_negative=1.5, lambda_negative=0.5)
    for ratio in (0.2, 0.9, 1.0, 1.7, 5.0):
        for advantage, k, rate in ((2.0, 2.0, 3.0), (-3.0, 1.5, 0.5)):
            phi = math.exp(rate) * ratio**k * math.exp(-rate * ratio)
            found = loss_and_gradient(surrogate, ratio, advantage)
            expected = (-phi * advantage * math.log(ratio), -phi * advantage)
            assert found == pytest.approx(expected, rel=0, abs=1e-9)
    # negative control: a gradient through φ would be another one
    assert loss_and_gradient(VESPO(), 2.0, 1.0)[1] != pytest.approx(-math.exp(3) * 4 * math.exp(-6) * 1.5, abs=1e-3)


def test_vespo_weighs_one_at_the_old_policy_and_most_at_its_peak(float64):
    for surrogate in (VESPO(), VESPO(k_positive=0.3, lambda_positive=7.0, k_negative=5.0, lambda_negative=0.1)):
        for sign, k, rate in (
            (1.0, surrogate.k_positive, surrogate.lambda_positive),
            (-1.0, surrogate.k_negative, surrogate.lambda_negative),
        ):
            x = torch.arange(-500, 501, dtype=torch.float64) / 100
            weights = surrogate.weight(x, torch.full_like(x, sign))
            assert float(weights[500]) == 1.0  # φ(1), exactly
            assert float(x[weights.argmax()]) == pytest.approx(math.log(k / rate), abs=0.0051)


def test_vespo_holds_the_ratio_within_the_bounds_of_the_paper_code(float64):
    low = math.log(1e-8)
    x = float64([-1e4, -50.0, low, low + 1])
    weights = VESPO().weight(x, torch.ones_like(x))
    assert torch.equal(weights[:2], weights[2].expand(2))
    assert float(weights[3]) > float(weights[2])
    assert VESPO().weight(float64([20.0, 1e4]), float64([1.0, -1.0])).tolist() == [0.0, 0.0]


def test_temperatures_and_exponents_out_of_range_are_refused():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        for kind, name in (
            (SAPO, "temperature_positive"),
            (SAPO, "temperature_negative"),
            (VESPO, "lambda_positive"),
            (VESPO, "lambda_negative"),
        ):
            with pytest.raises(ValueError, match=f"`{name}` must be a number above 0"):
                kind(**{name: bad})
    for name in ("k_positive", "k_negative"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            VESPO(**{name: -0.1})
        VESPO(**{name: 0.0})
