import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    ClipScore,
    LengthNormalized,
    LengthPenalty,
    MissingEOSPenalty,
    Shaping,
    SoftOverlong,
    TruncatedScore,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
ENDED = torch.tensor([True, False, True, False])
LENGTHS = torch.tensor([1, 5, 12, 20])
RULES = [
    TruncatedScore(),
    MissingEOSPenalty(),
    SoftOverlong(limit=16, buffer=8),
    LengthPenalty(coef=0.1),
    LengthNormalized(),
    ClipScore(),
]


def shaped(rule, scores, *, lengths=LENGTHS, ended=ENDED):
    return rule(scores, lengths=lengths, ended=ended)


# A response without end token.


def test_replace_score_sets_the_value_and_leaves_ended_responses(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert torch.equal(shaped(TruncatedScore(), scores), float64([1.0, -1.0, -3.0, -1.0]))
    assert torch.equal(shaped(TruncatedScore(value=0.5), scores), float64([1.0, 0.5, -3.0, 0.5]))


def test_subtract_from_score_lowers_by_the_penalty(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert torch.equal(shaped(MissingEOSPenalty(), scores), float64([1.0, 1.0, -3.0, -5.0]))
    assert torch.equal(shaped(MissingEOSPenalty(penalty=0.5), scores), float64([1.0, 1.5, -3.0, -4.5]))
    assert torch.equal(shaped(MissingEOSPenalty(penalty=0.0), scores), scores)


def test_replace_score_hides_what_the_reward_said_of_a_cut_response(float64):
    # the reward of a cut response may be anything; of an ended one it shows
    got = shaped(TruncatedScore(), float64([1.0, NAN, 2.0, 9.0]))
    assert torch.equal(got, float64([1.0, -1.0, 2.0, -1.0]))
    assert shaped(TruncatedScore(), float64([NAN, 0.0, 0.0, 0.0]))[0].isnan()


@pytest.mark.parametrize("rule", [TruncatedScore(), MissingEOSPenalty()], ids=repr)
def test_rules_on_the_end_look_at_the_end_and_not_at_the_length(float64, rule):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert torch.equal(shaped(rule, scores, lengths=LENGTHS.flip(0)), shaped(rule, scores))
    everything, nothing = torch.ones_like(ENDED), torch.zeros_like(ENDED)
    assert torch.equal(shaped(rule, scores, ended=everything), scores)
    assert (shaped(rule, scores, ended=nothing) != scores).all()  # negative control


# The length.


def test_soft_overlong_equals_hand_values(float64):
    # limit 16, buffer 8: free up to 8 tokens, half the penalty at 12, all of it from 16 on
    lengths = torch.tensor([1, 7, 8, 9, 12, 15, 16, 17, 400])
    expected = [0.0, 0.0, 0.0, -0.125, -0.5, -0.875, -1.0, -1.0, -1.0]
    ended = torch.zeros(9, dtype=torch.bool)
    got = SoftOverlong(limit=16, buffer=8)(float64([0.0] * 9), lengths=lengths, ended=ended)
    assert_close(got, float64(expected), **TIGHT)
    # ended or not, and on top of the score, times the penalty
    doubled = SoftOverlong(limit=16, buffer=8, penalty=2.0)(float64([3.0] * 9), lengths=lengths, ended=~ended)
    assert_close(doubled, float64([3 + 2 * x for x in expected]), **TIGHT)


@given(st.integers(1, 60), st.integers(1, 40), st.floats(0.1, 5), st.integers(1, 100))
@settings(deadline=None, max_examples=30)
def test_soft_overlong_equals_the_three_branches_of_the_paper(room, buffer, penalty, length):
    # Yu et al. 2025, eq. 13, with L_max = room + buffer − 1 ≥ L_c = buffer
    limit = room + buffer - 1
    if length <= limit - buffer:
        expected = 0.0
    elif length <= limit:
        expected = penalty * ((limit - buffer) - length) / buffer
    else:
        expected = -penalty
    rule = SoftOverlong(limit=limit, buffer=buffer, penalty=penalty)
    score = torch.zeros(1, dtype=torch.float64)
    got = rule(score, lengths=torch.tensor([length]), ended=torch.tensor([True]))
    assert abs(float(got) - expected) <= 1e-9


def test_every_number_of_soft_overlong_moves_it(float64):
    base = SoftOverlong(limit=16, buffer=8)
    scores, lengths, ended = float64([0.0]), torch.tensor([12]), torch.tensor([False])
    # −½; limit 20: −0/8 = 0; buffer 16: −12/16; penalty 4: −2
    others = [replace(base, limit=20), replace(base, buffer=16), replace(base, penalty=4.0)]
    got = [float(rule(scores, lengths=lengths, ended=ended)) for rule in (base, *others)]
    assert got == [-0.5, 0.0, -0.75, -2.0]


def test_soft_overlong_may_use_the_whole_limit_as_its_buffer(float64):
    got = SoftOverlong(limit=4, buffer=4)(float64([0.0, 0.0]), lengths=torch.tensor([1, 4]), ended=ENDED[:2])
    assert torch.equal(got, float64([-0.25, -1.0]))


def test_length_penalty_is_a_price_per_token(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert_close(shaped(LengthPenalty(coef=0.1), scores), float64([0.9, 1.5, -4.2, -6.0]), **TIGHT)
    assert_close(shaped(LengthPenalty(coef=1.0), scores), float64([0.0, -3.0, -15.0, -24.0]), **TIGHT)


def test_length_normalized_is_the_score_per_token_times_a_length(float64):
    scores = float64([1.0, 2.0, -3.0, -4.0])
    assert_close(shaped(LengthNormalized(), scores), float64([1.0, 0.4, -0.25, -0.2]), **TIGHT)
    assert_close(shaped(LengthNormalized(length=10.0), scores), float64([10.0, 4.0, -2.5, -2.0]), **TIGHT)
    # a response of `length` tokens keeps its score
    assert_close(shaped(LengthNormalized(length=5.0), scores)[1], float64(2.0), **TIGHT)


def test_clip_score_holds_the_score_in_its_bounds(float64):
    scores = float64([-7.0, -5.0, 4.9, 1e9])
    assert torch.equal(shaped(ClipScore(), scores), float64([-5.0, -5.0, 4.9, 5.0]))
    assert torch.equal(shaped(ClipScore(low=-6.0), scores), float64([-6.0, -5.0, 4.9, 5.0]))
    assert torch.equal(shaped(ClipScore(high=2.0), scores), float64([-5.0, -5.0, 2.0, 2.0]))
    # one side only
    assert torch.equal(shaped(ClipScore(low=-math.inf, high=0.0), scores), float64([-7.0, -5.0, 0.0, 0.0]))


@pytest.mark.parametrize("rule", RULES[2:], ids=repr)
def test_rules_on_length_and_size_do_not_look_at_the_end(float64, rule):
    scores = float64([1.0, 20.0, -3.0, -40.0])
    assert torch.equal(shaped(rule, scores, ended=~ENDED), shaped(rule, scores))


# All rules.


def test_order_of_rules_matters(float64):
    # clip, then price the length: 5 − 12 = −7; price, then clip: 30 − 12 = 18 → 5
    scores, lengths, ended = float64([30.0]), torch.tensor([12]), torch.tensor([True])
    clip, price = ClipScore(), LengthPenalty(coef=1.0)

    def composed(*rules):
        x = scores
        for rule in rules:
            x = rule(x, lengths=lengths, ended=ended)
        return float(x)

    assert composed(clip, price) == -7
    assert composed(price, clip) == 5
    # rules that add commute
    penalty = MissingEOSPenalty(penalty=2.0)
    assert composed(penalty, price) == composed(price, penalty)


def test_replacing_last_makes_every_cut_response_equal(float64):
    # a fixed value is fixed only where nothing follows it: a length rule after it tells 5 tokens from 20
    scores = float64([1.0, 2.0, -3.0, -4.0])
    fixed, price = TruncatedScore(), LengthPenalty(coef=0.1)
    last, first = shaped(fixed, shaped(price, scores)), shaped(price, shaped(fixed, scores))
    assert torch.equal(last[~ENDED], float64([-1.0, -1.0]))
    assert_close(first[~ENDED], float64([-1.5, -3.0]), **TIGHT)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shaping_keeps_dtype_and_stays_finite(rule, dtype):
    scores = torch.tensor([1e4, -1e4, 0.0, -0.0], dtype=dtype)
    for ended in (ENDED, ~ENDED):
        got = shaped(rule, scores, lengths=torch.tensor([1, 2, 10**6, 1]), ended=ended)
        assert got.dtype == dtype
        assert got.shape == (4,)
        assert got.isfinite().all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_shaping_does_not_modify_its_input(float64, rule):
    scores, lengths, ended = float64([9.0, 2.0, -9.0, 3.0]), LENGTHS.clone(), ENDED.clone()
    got = rule(scores, lengths=lengths, ended=ended)
    assert torch.equal(scores, float64([9.0, 2.0, -9.0, 3.0]))
    assert torch.equal(lengths, LENGTHS)
    assert torch.equal(ended, ENDED)
    assert not torch.equal(got, scores)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_shaping_treats_every_response_alone(rule):
    scores = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 8
    whole = shaped(rule, scores)
    for i in range(4):
        row = slice(i, i + 1)
        assert torch.equal(rule(scores[row], lengths=LENGTHS[row], ended=ENDED[row]), whole[row])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_score_that_is_not_a_number_shows_where_it_counts(float64, rule):
    # row 0 ended, within every limit: no rule turns an unknown score into a known one
    assert shaped(rule, float64([NAN, 1.0, 1.0, 1.0]))[0].isnan()


def test_shaping_defaults_are_the_published_ones():
    # Ziegler et al. 2019, code: −1; TRL: 1; DAPO: 1
    assert TruncatedScore() == TruncatedScore(value=-1.0)
    assert MissingEOSPenalty() == MissingEOSPenalty(penalty=1.0)
    assert SoftOverlong(limit=20480, buffer=4096) == SoftOverlong(limit=20480, buffer=4096, penalty=1.0)
    assert ClipScore() == ClipScore(low=-5.0, high=5.0)
    assert LengthNormalized() == LengthNormalized(length=1.0)


# What is refused.


@pytest.mark.parametrize("bad", [-1.0, NAN, math.inf])
def test_subtract_from_score_refuses_a_bonus(bad):
    with pytest.raises(ValueError, match="`penalty` must be a number of at least 0: got"):
        MissingEOSPenalty(penalty=bad)


@pytest.mark.parametrize(
    ("name", "bad"), list(product(["limit", "buffer", "penalty"], [0, -1, NAN, math.inf])), ids=str
)
def test_soft_overlong_refuses_numbers_that_are_not_above_zero(name, bad):
    with pytest.raises(ValueError, match=f"`{name}` must be a number above 0: got {bad}"):
        SoftOverlong(**{"limit": 16, "buffer": 8, "penalty": 1.0} | {name: bad})


def test_soft_overlong_refuses_a_buffer_beyond_the_limit():
    with pytest.raises(ValueError, match="`buffer` must not exceed `limit`: got 17 of 16 tokens"):
        SoftOverlong(limit=16, buffer=17)


@pytest.mark.parametrize("bad", [0.0, -0.1, NAN, math.inf])
def test_length_rules_refuse_numbers_that_are_not_above_zero(bad):
    with pytest.raises(ValueError, match="`coef` must be a number above 0: got"):
        LengthPenalty(coef=bad)
    with pytest.raises(ValueError, match="`length` must be a number above 0: got"):
        LengthNormalized(length=bad)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_replace_score_refuses_a_value_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="`value`"):
        TruncatedScore(value=bad)


@pytest.mark.parametrize(("low", "high"), [(5.0, 5.0), (6.0, 5.0), (NAN, 5.0), (-5.0, NAN)])
def test_clip_score_refuses_bounds_out_of_order(low, high):
    with pytest.raises(ValueError, match="`low` must be below `high`: got"):
        ClipScore(low=low, high=high)


def test_shaping_is_abstract():
    with pytest.raises(TypeError):
        Shaping()
