import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import ActionLevel, Clip, GeometricLevel, GeometricTokenLevel, SequenceLevel, TokenLevel

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
LEVELS = [TokenLevel(), SequenceLevel(), GeometricLevel()]
RESPONSE = torch.tensor([[True, True, True], [True, False, False]])
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def ragged(lengths, seed, width=5):
    """Random numbers in the response, NaN outside."""
    response = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    x = torch.randn(len(lengths), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.where(response, x, NAN), response


def test_sequence_level_sums_the_tokens_of_the_response(float64):
    x = float64([[0.1, 0.2, 0.4], [1.5, NAN, 7.0]])
    for level in (SequenceLevel(), GeometricLevel()):
        assert_close(level.total(x, RESPONSE), float64([[0.7], [1.5]]), **TIGHT)


def test_token_level_keeps_tokens_and_zeroes_the_rest(float64):
    x = float64([[0.1, 0.2, 0.4], [1.5, NAN, 7.0]])
    assert torch.equal(TokenLevel().total(x, RESPONSE), float64([[0.1, 0.2, 0.4], [1.5, 0.0, 0.0]]))
    assert torch.equal(TokenLevel().state_value(x, RESPONSE), float64([[0.1, 0.2, 0.4], [1.5, 0.0, 0.0]]))


def test_masks_say_which_actions_count():
    assert torch.equal(TokenLevel().mask(RESPONSE), RESPONSE)
    response = torch.cat([RESPONSE, torch.zeros(1, 3, dtype=torch.bool)])
    for level in (SequenceLevel(), GeometricLevel()):
        assert torch.equal(level.mask(response), torch.tensor([[True], [True], [False]]))


def test_sequence_state_value_is_that_of_the_prompts_last_token(float64):
    # values (B, R) start before the first response token; a mean over tokens would be 2 and 5/3
    values = float64([[1.0, 2.0, 3.0], [5.0, 0.0, NAN]])
    for level in (SequenceLevel(), GeometricLevel()):
        assert torch.equal(level.state_value(values, RESPONSE), float64([[1.0], [5.0]]))


def test_log_ratio_is_new_less_old(float64):
    new, old = float64([[-1.0, -2.0, -3.0], [-0.5, 0.0, NAN]]), float64([[-1.5, -2.5, -2.25], [-1.0, NAN, 0.0]])
    # tokens: 0.5, 0.5, −0.75 | 0.5; sequences: 0.25 and 0.5; per token of them: 1/12 and 0.5
    assert_close(TokenLevel().log_ratio(new, old, RESPONSE), float64([[0.5, 0.5, -0.75], [0.5, 0.0, 0.0]]), **TIGHT)
    assert_close(SequenceLevel().log_ratio(new, old, RESPONSE), float64([[0.25], [0.5]]), **TIGHT)
    assert_close(GeometricLevel().log_ratio(new, old, RESPONSE), float64([[1 / 12], [0.5]]), **TIGHT)
    # negative control: the sign
    assert SequenceLevel().log_ratio(old, new, RESPONSE)[1, 0] == -0.5
    # negative control: the mean over the padded width would be 0.5/3
    assert abs(float(GeometricLevel().log_ratio(new, old, RESPONSE)[1, 0]) - 0.5 / 3) > 0.3


def test_sequence_ratio_is_the_product_of_the_token_ratios_and_the_geometric_their_mean(float64):
    # ten tokens of ratio 1.05: 1.05¹⁰ = 1.62889..., outside the clip bounds although no token is
    new = float64([[1.05] * 10]).log()
    everything = torch.ones(1, 10, dtype=torch.bool)
    old = torch.zeros_like(new)
    assert_close(SequenceLevel().log_ratio(new, old, everything).exp(), float64([[1.628894626777442]]), **TIGHT)
    assert_close(TokenLevel().log_ratio(new, old, everything).exp(), float64([[1.05] * 10]), **TIGHT)
    assert_close(GeometricLevel().log_ratio(new, old, everything).exp(), float64([[1.05]]), **TIGHT)
    # ratios 2, 4 and 1: (2·4·1)^(1/3) = 2
    new = float64([[2.0, 4.0, 1.0]]).log()
    got = GeometricLevel().log_ratio(new, torch.zeros_like(new), everything[:, :3])
    assert_close(got.exp(), float64([[2.0]]), **TIGHT)


@given(LENGTHS, st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_levels_equal_naive_loops(lengths, seed):
    (new, response), (old, _) = ragged(lengths, seed), ragged(lengths, seed + 1)
    rows = [[float(new[i, t] - old[i, t]) for t in range(n)] for i, n in enumerate(lengths)]
    padded = torch.tensor([row + [0.0] * (5 - len(row)) for row in rows], dtype=torch.float64)
    sums = torch.tensor([[math.fsum(row)] for row in rows], dtype=torch.float64)
    means = torch.tensor([[math.fsum(row) / max(len(row), 1)] for row in rows], dtype=torch.float64)
    expected = {"TokenLevel": (padded, padded), "SequenceLevel": (sums, sums), "GeometricLevel": (sums, means)}
    for level in LEVELS:
        total, log_ratio = expected[type(level).__name__]
        assert_close(level.total(new - old, response), total, **TIGHT)
        assert_close(level.log_ratio(new, old, response), log_ratio, **TIGHT)
        assert torch.equal(
            level.mask(response), response if log_ratio is padded else torch.tensor(lengths)[:, None] > 0
        )


@given(LENGTHS, st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_spread_hands_out_equal_parts_that_total_collects(lengths, seed):
    x, response = ragged(lengths, seed)
    for level in LEVELS:
        actions = level.total(x, response)
        got = level.spread(torch.where(level.mask(response), actions, NAN), response)
        for i, n in enumerate(lengths):
            whole = math.fsum(float(x[i, t]) for t in range(n))
            for t in range(5):
                part = 0.0 if t >= n else float(x[i, t]) if isinstance(level, TokenLevel) else whole / n
                assert abs(float(got[i, t]) - part) <= 1e-9
        assert_close(level.total(got, response), actions, **TIGHT)


def test_spread_equals_hand_values(float64):
    response = torch.cat([RESPONSE, torch.zeros(1, 3, dtype=torch.bool)])
    for level in (SequenceLevel(), GeometricLevel()):
        got = level.spread(float64([[6.0], [5.0], [NAN]]), response)
        assert_close(got, float64([[2.0, 2.0, 2.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), **TIGHT)
    got = TokenLevel().spread(float64([[1.0, 2.0, 3.0], [4.0, NAN, 7.0], [NAN] * 3]), response)
    assert_close(got, float64([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), **TIGHT)


def test_spread_passes_gradients_on_and_none_from_masked_slots(float64):
    # Σ of the parts weighted by 1, 2, 3: the sequence gets their mean 2, and 1 for a single token
    weights, response = float64([1.0, 2.0, 3.0]), torch.cat([RESPONSE, torch.zeros(1, 3, dtype=torch.bool)])
    x = float64([[6.0], [5.0], [NAN]], requires_grad=True)
    (SequenceLevel().spread(x, response) * weights).sum().backward()
    assert_close(x.grad, float64([[2.0], [1.0], [0.0]]), **TIGHT)
    x = float64([[6.0, 1.0, 0.0], [5.0, NAN, NAN], [NAN] * 3], requires_grad=True)
    (TokenLevel().spread(x, response) * weights).sum().backward()
    assert_close(x.grad, float64([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0], [0.0] * 3]), **TIGHT)


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_padding_and_what_stands_in_it_change_nothing(level):
    (new, response), (old, _) = ragged([3, 1, 5, 0], 7), ragged([3, 1, 5, 0], 8)
    reference = level.log_ratio(new, old, response)
    for fill in (0.0, -1e30, float("inf"), NAN):
        wide = torch.full((4, 3), fill, dtype=torch.float64)
        more = torch.cat([response, torch.zeros(4, 3, dtype=torch.bool)], 1)
        x, y = (
            torch.cat([torch.where(response, new, fill), wide], 1),
            torch.cat([torch.where(response, old, 3.0), wide], 1),
        )
        assert torch.equal(level.log_ratio(x, y, more)[:, : reference.shape[1]], reference)
        assert level.log_ratio(x, y, more)[:, reference.shape[1] :].eq(0).all()
    # negative control: a slot that counts does change it
    assert not torch.equal(level.log_ratio(torch.where(new == new[0, 0], new + 1, new), old, response), reference)


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_masked_tokens_get_no_gradient(float64, level):
    new = float64([[-1.0, -2.0, -3.0], [-0.5, NAN, NAN]], requires_grad=True)
    level.log_ratio(new, torch.zeros_like(new), RESPONSE).sum().backward()
    # the geometric mean shares its gradient among the tokens
    first = 1 / 3 if isinstance(level, GeometricLevel) else 1.0
    assert_close(new.grad, float64([[first] * 3, [1.0, 0.0, 0.0]]), **TIGHT)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-3, 3)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=20)
def test_responses_of_one_token_are_the_same_at_every_level(pairs):
    # GSPO with |y| = 1 is the token clip, and so is the bandit's
    new = torch.tensor([[x, NAN] for x, _ in pairs], dtype=torch.float64)
    old, advantages = torch.zeros_like(new), torch.tensor([[a] for _, a in pairs], dtype=torch.float64)
    response = torch.tensor([[True, False]]).expand(len(pairs), 2)
    clip = Clip(epsilon=3e-4, epsilon_high=4e-4)
    tokens = clip(TokenLevel().log_ratio(new, old, response)[:, :1], advantages)
    for level in LEVELS[1:]:
        assert_close(clip(level.log_ratio(new, old, response), advantages), tokens, **TIGHT)
    for (x, a), loss in zip(pairs, tokens.loss.squeeze(1).tolist(), strict=True):
        held = min(max(math.exp(x), 1 - 3e-4), 1 + 4e-4)
        assert abs(loss + min(math.exp(x) * a, held * a)) <= 1e-9


def test_the_geometric_ratio_leaves_the_bounds_later_than_a_product(float64):
    # negative control of the test above: two tokens of ratio 1.15, 1.3225 against 1.15 with ε = 0.2
    new, everything = float64([[1.15, 1.15]]).log(), torch.ones(1, 2, dtype=torch.bool)
    for level, clipped in ((GeometricLevel(), 0.0), (SequenceLevel(), 1.0)):
        out = Clip()(level.log_ratio(new, torch.zeros_like(new), everything), float64([[1.0]]))
        assert out.stats["policy/clipfrac_avg"].item() == clipped


def test_levels_compare_by_kind():
    assert GeometricLevel() == GeometricLevel()
    assert len({TokenLevel(), SequenceLevel(), GeometricLevel(), SequenceLevel()}) == 3


def test_action_level_is_abstract():
    with pytest.raises(TypeError):
        ActionLevel()


def test_every_token_has_the_geometric_mean_of_its_response(float64):
    new, old = float64([[0.1, 0.2, NAN], [1.5, NAN, NAN]]), float64([[0.0, 0.0, 0.0], [0.5, NAN, 0.0]])
    response = torch.tensor([[True, True, False], [True, False, False]])
    level = GeometricTokenLevel()
    assert_close(level.log_ratio(new, old, response), float64([[0.15, 0.15, 0.0], [1.0, 0.0, 0.0]]), **TIGHT)
    assert torch.equal(level.mask(response), response)
    whole = GeometricLevel().log_ratio(new, old, response)
    assert torch.equal(level.log_ratio(new, old, response)[:, :1], whole)
    # negative control: the tokens' own ratios
    assert_close(TokenLevel().log_ratio(new, old, response)[0, :2], float64([0.1, 0.2]), **TIGHT)
