import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    CISPO,
    Algorithm,
    Clip,
    GeometricLevel,
    ImportanceSampling,
    KLPen,
    MaskedIS,
    MismatchIS,
    NoCorrection,
    SequenceLevel,
    TokenLevel,
    TruncatedIS,
)

TIGHT = {"rtol": 0, "atol": 1e-9}
SEQUENCE, GEOMETRIC = SequenceLevel(), GeometricLevel()


def weighed(surrogate, mismatch, *, response=None, level=TokenLevel()):
    """Weights of log π_old − log π_sampler per token, at a log π_sampler that is not 0."""
    sampler = torch.linspace(-4, -1, mismatch.shape[1]).to(mismatch).expand_as(mismatch)
    response = torch.ones_like(mismatch, dtype=torch.bool) if response is None else response
    return surrogate.weights(mismatch + sampler, sampler, response, level)


def weights(surrogate, *ratios):
    mismatch = torch.tensor([[math.log(w) for w in ratios]], dtype=torch.float64)
    return weighed(surrogate, mismatch).applied.squeeze(0).tolist()


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
    truncated = weighed(TruncatedIS(cap=cap), x).applied.squeeze(0).tolist()
    assert truncated == pytest.approx([w if w < cap else cap for w in ratios], rel=0, abs=1e-9)
    masked = weighed(MaskedIS(smallest=smallest, largest=largest), x).applied.squeeze(0).tolist()
    assert masked == pytest.approx([w if smallest <= w <= largest else 0.0 for w in ratios], rel=0, abs=1e-9)


def test_no_mismatch_weighs_one(float64):
    for surrogate in (TruncatedIS(), MaskedIS(), TruncatedIS(surrogate=CISPO())):
        found = weighed(surrogate, torch.zeros(2, 3, dtype=torch.float64))
        assert torch.equal(found.applied, float64([[1.0] * 3] * 2))
        assert torch.equal(found.changed, float64([[0.0] * 3] * 2))


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
    assert_close(weighed(TruncatedIS(cap=2.0), x).applied, torch.tensor([[0.0, 0.0, 2.0, 2.0]]), rtol=0, atol=1e-30)
    assert torch.equal(weighed(MaskedIS(), x).applied, torch.zeros(1, 4))
    for level in (None, SEQUENCE, GEOMETRIC):
        for rows in (x, x.abs(), -x.abs()):
            found = weighed(TruncatedIS(cap=1e30, level=level), rows)
            assert all(part.isfinite().all() for part in (*found, *found.stats(rows).values()))


def test_weights_refuse_numbers_out_of_range():
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`cap` must be a number above 0: got"):
            TruncatedIS(cap=bad)
        with pytest.raises(ValueError, match="`largest` must be a number above 0: got"):
            MaskedIS(largest=bad)
    for bad in (-0.1, 2.0, 3.0, float("nan")):
        with pytest.raises(ValueError, match=r"`smallest` must lie in \[0, largest\): got"):
            MaskedIS(smallest=bad, largest=2.0)


# One weight for a response of several tokens.

# w of the tokens: 2, 1.5; 0.5, 0.5, 4; 3. Of the responses: 3, 1, 3; geometric means √3, 1, 3.
RATIOS = torch.tensor([[2.0, 1.5, 9.0], [0.5, 0.5, 4.0], [3.0, 9.0, 9.0]], dtype=torch.float64)
RESPONSE = torch.arange(3) < torch.tensor([[2], [3], [1]])
MISMATCH = torch.where(RESPONSE, RATIOS.log(), float("nan"))


def of_responses(surrogate, level=TokenLevel()):
    return weighed(surrogate, MISMATCH, response=RESPONSE, level=level)


def test_weights_of_responses_equal_hand_values(float64):
    for surrogate, applied, changed in (
        (TruncatedIS(cap=2.0, level=SEQUENCE), [2.0, 1.0, 2.0], [1.0, 0.0, 1.0]),
        (TruncatedIS(cap=4.0, level=SEQUENCE), [3.0, 1.0, 3.0], [0.0, 0.0, 0.0]),
        (MaskedIS(smallest=0.5, largest=2.0, level=SEQUENCE), [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]),
        (MaskedIS(smallest=1.5, largest=4.0, level=SEQUENCE), [3.0, 0.0, 3.0], [0.0, 1.0, 0.0]),
        (TruncatedIS(cap=1.8, level=GEOMETRIC), [math.sqrt(3), 1.0, 1.8], [0.0, 0.0, 1.0]),
        (MaskedIS(smallest=0.5, largest=2.0, level=GEOMETRIC), [math.sqrt(3), 1.0, 0.0], [0.0, 0.0, 1.0]),
    ):
        found = of_responses(surrogate)
        assert_close(found.applied, float64(applied).unsqueeze(1), **TIGHT)
        assert found.changed.squeeze(1).tolist() == changed
        ratio = [math.sqrt(3), 1.0, 3.0] if surrogate.level == GEOMETRIC else [3.0, 1.0, 3.0]
        assert_close(found.ratio, float64(ratio).unsqueeze(1), **TIGHT)
        # whether tokens or whole responses are the actions
        for level in (SEQUENCE, GEOMETRIC):
            assert torch.equal(of_responses(surrogate, level).applied, found.applied)


def test_token_weights_are_other_numbers_than_those_of_responses(float64):
    # negative control: the middle response has w = 1 as a whole, and no token of it has
    found = of_responses(TruncatedIS(cap=2.0))
    assert_close(found.applied[RESPONSE], float64([2.0, 1.5, 0.5, 0.5, 2.0, 2.0]), **TIGHT)
    assert found.changed[RESPONSE].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_named_level_of_the_actions_changes_no_bit():
    for level in (TokenLevel(), SEQUENCE):
        named, left_out = (of_responses(TruncatedIS(level=at), level) for at in (level, None))
        assert all(map(torch.equal, named, left_out))
    # under GSPO the actions are whole responses, and their geometric mean is taken where it is named
    assert torch.equal(of_responses(TruncatedIS(cap=9.0), GEOMETRIC).ratio, of_responses(TruncatedIS(), SEQUENCE).ratio)


def test_corrections_inside_one_another_have_the_one_level_that_is_named(float64):
    for nested in (
        TruncatedIS(cap=2.0, level=SEQUENCE, surrogate=MaskedIS(smallest=0.9, largest=5.0)),
        TruncatedIS(cap=2.0, surrogate=MaskedIS(smallest=0.9, largest=5.0, level=SEQUENCE)),
        TruncatedIS(cap=2.0, level=SEQUENCE, surrogate=MaskedIS(smallest=0.9, largest=5.0, level=SEQUENCE)),
    ):
        assert_close(of_responses(nested).applied, float64([[2.0], [1.0], [2.0]]), **TIGHT)
        assert Algorithm(level=TokenLevel(), surrogate=nested).surrogate == nested
    two = TruncatedIS(level=SEQUENCE, surrogate=MaskedIS(level=GEOMETRIC))
    with pytest.raises(ValueError, match="`level` names SequenceLevel and GeometricLevel: name it in one"):
        Algorithm(level=TokenLevel(), surrogate=two)


@pytest.mark.parametrize("actions", [SEQUENCE, GEOMETRIC], ids=repr)
@pytest.mark.parametrize("kind", [TruncatedIS, MaskedIS, NoCorrection])
def test_weights_of_tokens_are_refused_where_actions_are_responses(kind, actions):
    wrong = kind(level=TokenLevel(), surrogate=ImportanceSampling())
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(level=TokenLevel\(\)\) weights parts of an action"):
        Algorithm(level=actions, surrogate=wrong)
    with pytest.raises(ValueError, match="leave `level` out, take SequenceLevel"):
        Algorithm(level=actions, surrogate=kind(surrogate=MaskedIS(level=TokenLevel())))
    for fits in (None, SEQUENCE, GEOMETRIC):
        Algorithm(level=actions, surrogate=kind(level=fits, surrogate=ImportanceSampling()))
    Algorithm(level=TokenLevel(), surrogate=wrong)


def test_no_correction_weighs_one_and_measures_at_its_level(float64):
    for level, ratio in ((None, RATIOS[RESPONSE]), (SEQUENCE, float64([3.0, 1.0, 3.0]))):
        found = of_responses(NoCorrection(level=level))
        assert torch.equal(found.applied, torch.ones_like(found.ratio))
        assert torch.equal(found.changed, torch.zeros_like(found.ratio))
        assert_close(found.ratio[RESPONSE] if level is None else found.ratio.squeeze(1), ratio, **TIGHT)


def test_logged_squares_add_up_without_overflow():
    # 10,000 tokens at the largest w: e⁸⁰ · 10⁴ is above float32's largest number
    x = torch.full((1, 10_000), 50.0)
    stats = weighed(Clip(), x).stats(x)
    mean = stats["policy/sampler_ratio"].mean().double()
    assert float(mean**2 / stats["policy/sampler_ratio_square"].mean()) == pytest.approx(1.0, abs=1e-5)
    assert stats["policy/sampler_ratio"].square().sum().isinf()  # negative control
    assert {name: stat.shape for name, stat in stats.items()} == dict.fromkeys(stats, x.shape)


# TRL's four modes.


def trl_weights(mode, old, sampler, mask, smallest, largest):
    """The ratio of TRL 1.16's GRPOTrainer, by its formula (grpo_trainer.py, "Compute the importance …")."""
    difference = (old - sampler) * mask
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(min=smallest, max=largest)
    return ratio.masked_fill((ratio < (smallest or -math.inf)) | (ratio > largest), 0.0)


def trl_code():
    """The same as the installed TRL writes it: the lines between two of its comments, as a function."""
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16"):
        pytest.skip(f"the lines are those of TRL 1.16, here is {trl.__version__}")
    source = (Path(trl.__file__).parent / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    _, rest = source.split("# Compute the importance sampling ratio when using vLLM", 1)
    _, rest = rest.split("\n", 1)
    lines, _ = rest.split("            # Compute the per-token log probabilities for the ref", 1)
    code = compile(textwrap.dedent(lines), "grpo_trainer.py", "exec")

    def run(mode, old, sampler, mask, smallest, largest):
        settings = {"mode": mode, "clip_min": smallest, "clip_max": largest, "correction": True}
        trainer = SimpleNamespace(use_vllm=True, **{f"vllm_importance_sampling_{k}": x for k, x in settings.items()})
        names = {"self": trainer, "old_per_token_logps": old, "sampling_per_token_logps": sampler, "math": math}
        names |= {"completion_mask": mask, "tool_mask": None, "torch": torch}
        exec(code, names)
        return names["vllm_importance_sampling_ratio"]

    return run


MODES = {
    "token_truncate": (TruncatedIS(cap=1.3), None, 1.3),
    "token_mask": (MaskedIS(smallest=0.8, largest=1.3), 0.8, 1.3),
    "sequence_truncate": (TruncatedIS(cap=1.3, level=SEQUENCE), None, 1.3),
    "sequence_mask": (MaskedIS(smallest=0.8, largest=1.3, level=SEQUENCE), 0.8, 1.3),
    "sequence_mask by default": (MaskedIS(smallest=0.0, largest=3.0, level=SEQUENCE), None, 3.0),
}


@pytest.mark.parametrize("theirs", [lambda: trl_weights, trl_code], ids=["formula", "installed"])
@pytest.mark.parametrize("mode", MODES)
def test_weights_are_those_of_trl(mode, theirs):
    generator = torch.Generator().manual_seed(0)
    old, noise = torch.randn(2, 64, 6, generator=generator, dtype=torch.float64)
    sampler, response = old + 0.3 * noise, torch.arange(6) < torch.arange(64).unsqueeze(1) % 6 + 1
    surrogate, smallest, largest = MODES[mode]
    expected = theirs()(mode.split()[0], old, sampler, response, smallest, largest)
    found = surrogate.weights(old, sampler, response, TokenLevel())
    assert found.applied.shape == expected.shape
    counts = response if expected.shape == response.shape else response[:, :1]
    assert_close(found.applied[counts], expected[counts], rtol=0, atol=1e-12)
    assert 0 < float(found.changed[counts].mean()) < 1
    # negative control: every other mode has other weights
    for other, (wrong, *_) in MODES.items():
        if other != mode:
            weights = wrong.weights(old, sampler, response, TokenLevel()).applied.expand_as(response)
            assert (weights - expected)[response].abs().max() > 0.01
