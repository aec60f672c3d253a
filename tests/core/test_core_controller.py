from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.core import AdaptiveKL, FixedKL, KLController, KLPen


def close(a, b):
    return abs(a - b) <= 1e-12


def test_adaptive_kl_equals_hand_value():
    # KL 12 is twice the target: e = clip(1, ±0.2) = 0.2; 0.15·(1 + 0.2·512/10000) = 0.15·1.01024 = 0.151536
    kl = AdaptiveKL(coef=0.15, target=6.0, horizon=10_000.0)
    assert close(kl.adapted(12.0, 512).coef, 0.151536)
    # negative control: the wrong rule exp(e·n/horizon) gives 0.15154393 ≠ 0.151536
    assert not close(kl.adapted(12.0, 512).coef, 0.15154393)


def test_adaptive_kl_inside_the_bounds_is_proportional_to_the_error():
    # KL 6.6: e = 0.1; 2·(1 + 0.1·100/1000) = 2.02. KL 5.4: e = −0.1; 2·0.99 = 1.98
    kl = AdaptiveKL(coef=2.0, target=6.0, horizon=1000.0)
    assert close(kl.adapted(6.6, 100).coef, 2.02)
    assert close(kl.adapted(5.4, 100).coef, 1.98)


@pytest.mark.parametrize("kl", [7.2, 12.0, 1e9, float("inf")])
def test_adaptive_kl_error_is_clipped_above(kl):
    assert close(AdaptiveKL(coef=1.0, target=6.0, horizon=100.0).adapted(kl, 50).coef, 1.1)  # 1 + 0.2·50/100


@pytest.mark.parametrize("kl", [4.8, 0.0, -3.0, -1e9])
def test_adaptive_kl_error_is_clipped_below(kl):
    assert close(AdaptiveKL(coef=1.0, target=6.0, horizon=100.0).adapted(kl, 50).coef, 0.9)  # 1 − 0.2·50/100


def test_adaptive_kl_at_its_target_keeps_beta():
    kl = AdaptiveKL(coef=0.15, target=6.0)
    assert kl.adapted(6.0, 512).coef == 0.15
    assert kl.adapted(6.1, 512).coef > 0.15 > kl.adapted(5.9, 512).coef


@given(st.floats(0, 20), st.integers(1, 512), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_adaptive_kl_equals_a_naive_formula(kl, episodes, coef):
    error = kl / 6.0 - 1
    error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
    expected = coef + coef * error * episodes / 10_000.0
    assert close(AdaptiveKL(coef=coef).adapted(kl, episodes).coef, expected)


def test_adaptive_kl_returns_a_successor_and_does_not_change():
    kl = AdaptiveKL(coef=0.15, target=3.0, horizon=500.0)
    successor = kl.adapted(30.0, 10)
    assert successor is not kl
    assert kl == AdaptiveKL(coef=0.15, target=3.0, horizon=500.0)
    assert (successor.target, successor.horizon) == (3.0, 500.0)
    with pytest.raises(FrozenInstanceError):
        kl.coef = 1.0


def test_fixed_kl_keeps_beta():
    kl = FixedKL(coef=0.05)
    assert kl.adapted(100.0, 512).coef == 0.05


def test_controller_defaults_are_the_published_ones():
    # Ouyang et al. 2022, C.4; Ziegler et al. 2019, launch values
    assert FixedKL() == FixedKL(coef=0.02)
    assert AdaptiveKL() == AdaptiveKL(coef=0.15, target=6.0, horizon=10_000.0)


def test_adaptive_kl_state_round_trip():
    moved = AdaptiveKL(coef=0.15, target=6.0).adapted(12.0, 512)
    state = moved.state()
    assert state == {"coef": moved.coef}
    assert all(type(value) is float for value in state.values())
    fresh = AdaptiveKL(coef=0.15, target=6.0)
    assert fresh.restored(state) == moved
    assert fresh != moved  # the round trip is not the identity by accident


def test_restored_keeps_the_settings_that_do_not_move():
    # β of the checkpoint, target and horizon of the run that resumes
    assert AdaptiveKL(coef=0.1, target=2.0, horizon=50.0).restored({"coef": 0.7}) == AdaptiveKL(
        coef=0.7, target=2.0, horizon=50.0
    )


def test_fixed_kl_has_nothing_to_save():
    assert FixedKL(coef=0.05).state() == {}
    assert FixedKL(coef=0.05).restored({}) == FixedKL(coef=0.05)


def test_restored_refuses_the_state_of_another_class():
    message = r"the checkpoint holds \['coef'\] for FixedKL, which needs \[\]: resume with the class that wrote it"
    with pytest.raises(ValueError, match=message):
        FixedKL().restored(AdaptiveKL().state())
    message = r"the checkpoint holds \[\] for AdaptiveKL, which needs \['coef'\]"
    with pytest.raises(ValueError, match=message):
        AdaptiveKL().restored(FixedKL().state())


def test_controllers_refuse_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"`coef` must be a number of at least 0: got -0.1"):
        FixedKL(coef=-0.1)
    assert FixedKL(coef=0.0).coef == 0.0
    for name in ("coef", "target", "horizon"):
        for bad in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"`{name}` must be a number above 0: got"):
                AdaptiveKL(**{name: bad})


@pytest.mark.parametrize("episodes", [50, 51, 10**6])
def test_a_rollout_too_large_for_the_horizon_is_refused(episodes):
    # 1 − 0.2·50/10 = 0: β would be lost for good, or negative
    message = rf"`horizon` must exceed episodes/5: got 10.0 for {episodes} episodes"
    with pytest.raises(ValueError, match=message):
        AdaptiveKL(coef=1.0, horizon=10.0).adapted(0.0, episodes)
    assert close(AdaptiveKL(coef=1.0, horizon=10.0).adapted(0.0, 49).coef, 0.02)


@pytest.mark.parametrize(
    ("kl_old", "factor"),
    [(0.0, 0.5), (0.0199, 0.5), (0.0201, 1.0), (0.03, 1.0), (0.0449, 1.0), (0.0451, 2.0), (9.0, 2.0)],
)
def test_penalty_halves_doubles_or_stays_at_the_thresholds_of_ppo(kl_old, factor):
    # target 0.03: below 0.03/1.5 = 0.02 half, above 0.03·1.5 = 0.045 twice (PPO §4)
    penalty = KLPen(coef=3.0, target=0.03)
    assert penalty.adapted(kl_old).coef == 3.0 * factor
    assert KLPen(coef=3.0, target=None).adapted(kl_old).coef == 3.0


def test_penalty_on_a_threshold_stays():
    # 0.75·1.5 and 0.75/1.5 are exact in binary: the comparison is strict on both sides
    assert KLPen(coef=3.0, target=0.75).adapted(1.125).coef == 3.0
    assert KLPen(coef=3.0, target=0.75).adapted(0.5).coef == 3.0


def test_a_kl_that_is_not_a_number_does_not_pass_silently():
    with pytest.raises(ValueError, match="KL to the reference is not a number: the policy diverged"):
        AdaptiveKL().adapted(float("nan"), 512)


def test_controller_is_abstract():
    with pytest.raises(TypeError):
        KLController()
