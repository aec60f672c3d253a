import pytest
import torch

from lightning_rlhf.core import ClippedValueLoss, ValueLoss


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        # c_v = 0.1, ε = 0.2: 0.05·max((V − R̂)², (clip(V, V_old ± 0.2) − R̂)²); d/dV = 0.1(V − R̂) unless clipped
        (0.6, 0.5, 1.0, 0.05 * 0.16, 0.1 * -0.4, 0.0),  # inside ±ε: plain
        (1.0, 0.5, 0.0, 0.05 * 1.0, 0.1 * 1.0, 0.0),  # moved away from R̂: 1 > 0.7², pulled back
        (1.0, 0.5, 2.0, 0.05 * 1.69, 0.0, 1.0),  # moved towards R̂ beyond 0.7: (0.7 − 2)² = 1.69 > 1, stop
        (0.0, 0.5, -1.0, 0.05 * 1.69, 0.0, 1.0),  # the same downwards: clip to 0.3, 1.3² > 1
        (0.0, 0.5, 1.0, 0.05 * 1.0, 0.1 * -1.0, 0.0),  # away downwards: 1 > 0.7²
        (0.5, 0.5, 0.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_value_loss_equals_hand_values(float64, value, old, target, loss, gradient, clipped):
    values = float64([[value]], requires_grad=True)
    out = ClippedValueLoss(epsilon=0.2, coef=0.1)(values, float64([[old]]), float64([[target]]))
    (slope,) = torch.autograd.grad(out.loss.sum(), values)
    assert abs(out.loss.item() - loss) <= 1e-9
    assert abs(slope.item() - gradient) <= 1e-9
    assert {name: stat.item() for name, stat in out.stats.items()} == {"value/clipfrac_avg": clipped}


def test_value_loss_moves_with_its_settings(float64):
    args = float64([[1.0]]), float64([[0.5]]), float64([[2.0]])
    # ε = 0.4: clip to 0.9, 1.1² = 1.21; ε = 1: plain 1; c_v = 1: ten times 0.1
    assert abs(ClippedValueLoss(epsilon=0.4)(*args).loss.item() - 0.05 * 1.21) <= 1e-9
    assert abs(ClippedValueLoss(epsilon=1.0)(*args).loss.item() - 0.05) <= 1e-9
    assert abs(ClippedValueLoss(coef=1.0)(*args).loss.item() - 0.5 * 1.69) <= 1e-9


def test_value_loss_is_never_below_the_plain_squared_error():
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 50, 4, dtype=torch.float64, generator=generator)
    plain = 0.05 * (values - returns) ** 2
    loss = ClippedValueLoss()(values, old, returns).loss
    assert (loss >= plain - 1e-12).all()
    assert (loss > plain + 1e-3).any()


def test_value_loss_defaults_are_the_published_ones():
    assert ClippedValueLoss() == ClippedValueLoss(epsilon=0.2, coef=0.1)  # Ziegler et al. 2019, code


def test_value_loss_refuses_numbers_out_of_range():
    for name in ("epsilon", "coef"):
        with pytest.raises(ValueError, match=rf"`{name}` must be a number above 0: got 0.0"):
            ClippedValueLoss(**{name: 0.0})


def test_value_loss_is_abstract():
    with pytest.raises(TypeError):
        ValueLoss()
