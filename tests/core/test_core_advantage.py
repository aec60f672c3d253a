import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    GAE,
    AdvantageEstimator,
    BanditAdvantage,
    BatchMean,
    LearnedValue,
    LeaveOneOut,
    NoBaseline,
    RewardToGo,
    RunningMean,
    Whitened,
    local,
    penalized_rewards,
)

NAN = float("nan")
TIGHT = {"rtol": 0, "atol": 1e-9}
MASK = torch.tensor([[True, True, True], [True, False, False]])


def credit(estimator, rewards, values=None, mask=None, *, all_sum=local):
    values = torch.zeros_like(rewards) if values is None else values
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return estimator(rewards, values, mask, groups=torch.arange(len(rewards)), all_sum=all_sum)


def ragged(seed, lengths, width=6):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = torch.randn(2, len(lengths), width, dtype=torch.float64, generator=generator)
    return rewards, values, mask


lengths_strategy = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def test_bandit_without_baseline_is_the_reward_itself(float64):
    rewards = float64([[2.0], [-3.0]])
    got = credit(BanditAdvantage(), rewards)
    assert torch.equal(got.advantages, rewards)
    assert torch.equal(got.returns, rewards)
    # no value enters, and BanditAdvantage() is that of NoBaseline
    assert torch.equal(credit(BanditAdvantage(), rewards, float64([[7.0], [7.0]])).advantages, rewards)
    assert BanditAdvantage() == BanditAdvantage(baseline=NoBaseline())
    assert not BanditAdvantage().needs_value


def test_bandit_at_token_level_spreads_the_total_over_every_action(float64):
    # totals 1 + 2 + 4 = 7 and 5, each on every action that counts, masked junk left out
    rewards = float64([[1.0, 2.0, 4.0], [5.0, NAN, 100.0]])
    got = credit(BanditAdvantage(), rewards, mask=MASK)
    assert torch.equal(got.advantages, float64([[7.0, 7.0, 7.0], [5.0, 0.0, 0.0]]))
    assert torch.equal(got.returns, got.advantages)
    # batch mean (7 + 5)/2 = 6: over responses, not over tokens (that would be 26/4 = 6.5)
    got = credit(BanditAdvantage(baseline=BatchMean()), rewards, mask=MASK)
    assert torch.equal(got.advantages, float64([[1.0, 1.0, 1.0], [-1.0, 0.0, 0.0]]))
    assert torch.equal(got.returns, float64([[7.0, 7.0, 7.0], [5.0, 0.0, 0.0]]))


def test_batch_mean_advantages_sum_to_zero_and_forget_a_constant(float64):
    rewards = float64([[2.0], [-3.0], [4.0]])  # mean 1
    centered = credit(BanditAdvantage(baseline=BatchMean()), rewards).advantages
    assert_close(centered, float64([[1.0], [-4.0], [3.0]]), **TIGHT)
    assert_close(credit(BanditAdvantage(baseline=BatchMean()), rewards + 50).advantages, centered, **TIGHT)
    # negative control: with no baseline the constant shows
    plain = [credit(BanditAdvantage(), r).advantages for r in (rewards, rewards + 50)]
    assert torch.equal(plain[1] - plain[0], float64([[50.0]] * 3))


def test_batch_mean_of_two_ranks_equals_one(as_ranks, float64):
    # ranks hold 1 and 3 responses: mean (8 + 0 + 2 + 2)/4 = 3
    ranks = [float64([[8.0]]), float64([[0.0], [2.0], [2.0]])]
    estimator = BanditAdvantage(baseline=BatchMean())
    got = as_ranks(lambda rank, all_sum: credit(estimator, ranks[rank], all_sum=all_sum).advantages)
    assert_close(torch.cat(got), float64([[5.0], [-3.0], [-1.0], [-1.0]]), **TIGHT)
    # negative control: each rank with its own mean gives 0 on the first
    assert credit(estimator, ranks[0]).advantages == 0


def test_bandit_with_a_learned_value_takes_that_of_the_first_state(float64):
    # the state of a bandit is the prompt: V before the first action, and no later one, masked junk or not
    rewards = float64([[1.0, 2.0, 4.0], [5.0, NAN, 100.0]])
    values = float64([[3.0, 50.0, 60.0], [-1.0, NAN, 70.0]])
    estimator = BanditAdvantage(baseline=LearnedValue())
    got = credit(estimator, rewards, values, MASK)
    assert torch.equal(got.advantages, float64([[4.0, 4.0, 4.0], [6.0, 0.0, 0.0]]))
    # the value network is trained on the reward, not on the advantage
    assert torch.equal(got.returns, float64([[7.0, 7.0, 7.0], [5.0, 0.0, 0.0]]))
    assert estimator.needs_value


def test_bandit_groups_whole_responses_and_not_actions(float64):
    # totals 7, 5, 3 of one prompt: the others' means 4, 5, 6, however many actions they have
    rewards = float64([[1.0, 2.0, 4.0], [5.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    mask = torch.tensor([[True] * 3, [True, False, False], [True, True, False]])
    estimator, groups = BanditAdvantage(baseline=LeaveOneOut()), torch.tensor([6, 6, 6])
    got = estimator(rewards, torch.zeros_like(rewards), mask, groups=groups, all_sum=local).advantages
    assert torch.equal(got, float64([[3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [-3.0, -3.0, 0.0]]))


def test_bandit_subtracts_its_running_mean(float64):
    estimator = BanditAdvantage(baseline=RunningMean(decay=0.5)).adapted(6.0).adapted(0.0)
    # m = 1.5, weight ¾: b = 2
    got = credit(estimator, float64([[7.0], [1.0]]))
    assert_close(got.advantages, float64([[5.0], [-1.0]]), **TIGHT)
    assert torch.equal(got.returns, float64([[7.0], [1.0]]))


def test_gae_equals_hand_values(float64):
    # γ = 0.5, λ = 0.5, r = 1, 2, 4; V = 1, 3, 5:
    # δ₂ = 4 − 5 = −1; δ₁ = 2 + 0.5·5 − 3 = 1.5; δ₀ = 1 + 0.5·3 − 1 = 1.5
    # Â₂ = −1; Â₁ = 1.5 − 0.25 = 1.25; Â₀ = 1.5 + 0.25·1.25 = 1.8125; R̂ = Â + V
    got = credit(GAE(gamma=0.5, lam=0.5), float64([[1.0, 2.0, 4.0]]), float64([[1.0, 3.0, 5.0]]))
    assert_close(got.advantages, float64([[1.8125, 1.25, -1.0]]), **TIGHT)
    assert_close(got.returns, float64([[2.8125, 4.25, 4.0]]), **TIGHT)


@given(lengths_strategy, st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_gae_equals_a_naive_double_loop(lengths, gamma, lam, seed):
    rewards, values, mask = ragged(seed, lengths)
    got = credit(GAE(gamma=gamma, lam=lam), rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask)
    r, v = rewards.tolist(), values.tolist()
    for i, length in enumerate(lengths):
        for t in range(6):
            expected = 0.0
            for k in range(t, length):
                following = v[i][k + 1] if k + 1 < length else 0.0
                expected += (gamma * lam) ** (k - t) * (r[i][k] + gamma * following - v[i][k])
            assert abs(float(got.advantages[i, t]) - expected) <= 1e-9
            assert abs(float(got.returns[i, t]) - (expected + v[i][t] if t < length else 0.0)) <= 1e-9


@given(lengths_strategy, st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_gae_without_discount_is_reward_to_go_less_value(lengths, seed):
    rewards, values, mask = ragged(seed, lengths)
    got = credit(GAE(gamma=1.0, lam=1.0), rewards, values, mask)
    for i, length in enumerate(lengths):
        for t in range(length):
            to_go = sum(rewards[i, t:length].tolist())
            assert abs(float(got.advantages[i, t]) - (to_go - float(values[i, t]))) <= 1e-9
            assert abs(float(got.returns[i, t]) - to_go) <= 1e-9


@given(lengths_strategy, st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_gae_at_lambda_zero_is_the_one_step_error(lengths, gamma, seed):
    rewards, values, mask = ragged(seed, lengths)
    got = credit(GAE(gamma=gamma, lam=0.0), rewards, values, mask).advantages
    for i, length in enumerate(lengths):
        for t in range(length):
            following = float(values[i, t + 1]) if t + 1 < length else 0.0
            assert abs(float(got[i, t]) - (float(rewards[i, t]) + gamma * following - float(values[i, t]))) <= 1e-9


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_of_a_final_reward_without_value_is_a_power_of_lambda(float64, lam):
    # V = 0, γ = 1: Â_t = λ^(T−1−t)·R with T = 4 and T = 2
    rewards = float64([[0.0, 0.0, 0.0, 3.0], [0.0, 5.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    got = credit(GAE(gamma=1.0, lam=lam), rewards, mask=mask).advantages
    expected = [[3 * lam**3, 3 * lam**2, 3 * lam, 3.0], [5 * lam, 5.0, 0.0, 0.0]]
    assert_close(got, float64(expected), **TIGHT)


def test_gae_of_a_perfect_value_has_no_advantage(float64):
    # V is the reward-to-go, so every δ is 0 whatever λ; negative control: V off by 1 at one step
    rewards, values = float64([[1.0, 2.0, 4.0]]), float64([[7.0, 6.0, 4.0]])
    for lam in (0.0, 0.5, 1.0):
        assert_close(credit(GAE(lam=lam), rewards, values).advantages, torch.zeros_like(rewards), **TIGHT)
    assert credit(GAE(), rewards, values + float64([[0.0, 1.0, 0.0]])).advantages.abs().max() > 0.9


def test_gae_of_the_bandit_is_reward_less_value(float64):
    # T = 1: Â = r − V, R̂ = r, whatever γ and λ
    rewards, values = float64([[3.0], [-1.0]]), float64([[1.0], [0.5]])
    got = credit(GAE(gamma=0.3, lam=0.4), rewards, values)
    assert_close(got.advantages, float64([[2.0], [-1.5]]), **TIGHT)
    assert_close(got.returns, rewards, **TIGHT)
    assert GAE().needs_value


def test_gae_rows_do_not_touch_each_other():
    rewards, values, mask = ragged(3, [6, 2, 4])
    whole = credit(GAE(), rewards, values, mask)
    for i in range(3):
        row = credit(GAE(), rewards[i : i + 1], values[i : i + 1], mask[i : i + 1])
        assert torch.equal(row.advantages[0], whole.advantages[i])


def test_gae_defaults_are_no_discount_and_the_published_lambda():
    # InstructGPT does not discount; λ = 0.95 (Ziegler et al. 2019, code)
    assert GAE() == GAE(gamma=1.0, lam=0.95)


def test_gae_refuses_numbers_outside_the_unit_interval():
    with pytest.raises(ValueError, match=r"`gamma` must lie in \[0, 1\]: got 1.1"):
        GAE(gamma=1.1)
    with pytest.raises(ValueError, match=r"`lam` must lie in \[0, 1\]: got -0.1"):
        GAE(lam=-0.1)


def test_reward_to_go_equals_hand_values(float64):
    # γ = ½: 4, 2 + 2, 1 + 2; and 5 alone
    rewards = float64([[1.0, 2.0, 4.0], [5.0, NAN, NAN]])
    got = credit(RewardToGo(gamma=0.5), rewards, mask=MASK)
    assert torch.equal(got.advantages, float64([[3.0, 4.0, 4.0], [5.0, 0.0, 0.0]]))
    assert torch.equal(got.returns, got.advantages)
    # γ = 1, the default: 7, 6, 4
    assert RewardToGo() == RewardToGo(gamma=1.0)
    assert torch.equal(credit(RewardToGo(), rewards, mask=MASK).advantages[0], float64([7.0, 6.0, 4.0]))
    assert not RewardToGo().needs_value
    assert not RewardToGo().needs_group


@given(lengths_strategy, st.floats(0, 1), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_reward_to_go_equals_a_naive_double_loop_and_sees_no_value(lengths, gamma, seed):
    rewards, values, mask = ragged(seed, lengths)
    got = credit(RewardToGo(gamma=gamma), rewards.masked_fill(~mask, NAN), values, mask)
    assert torch.equal(credit(RewardToGo(gamma=gamma), rewards, 9 * values, mask).advantages, got.advantages)
    for i, length in enumerate(lengths):
        for t in range(6):
            expected = sum(gamma ** (k - t) * float(rewards[i, k]) for k in range(t, length))
            assert abs(float(got.advantages[i, t]) - expected) <= 1e-9
            assert abs(float(got.returns[i, t]) - expected) <= 1e-9


def test_reward_to_go_starts_at_the_total_and_drops_what_is_past(float64):
    # the first action answers for everything, as in the bandit; later ones not for what came before
    rewards = float64([[1.0, 2.0, 4.0]])
    to_go, spread = credit(RewardToGo(), rewards).advantages, credit(BanditAdvantage(), rewards).advantages
    assert torch.equal(spread - to_go, float64([[0.0, 1.0, 3.0]]))


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_reward_to_go_refuses_numbers_outside_the_unit_interval(bad):
    with pytest.raises(ValueError, match=r"`gamma` must lie in \[0, 1\]: got"):
        RewardToGo(gamma=bad)


def test_reinforce_plus_plus_equals_hand_values(float64):
    # k1 per token in the reward, the score on the last token: rewards −β·kl + 1[last]·score, β = 0.5
    kl = float64([[0.2, -0.4, 0.6], [1.0, 2.0, NAN]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    rewards = penalized_rewards(float64([2.0, -1.0]), kl, mask, coef=0.5)
    # row 0: −0.1, 0.2, 1.7, to go 1.8, 1.9, 1.7; row 1: −0.5, −2, to go −2.5, −2
    to_go = [1.8, 1.9, 1.7, -2.5, -2.0]
    mean = 0.9 / 5
    unit = math.sqrt(sum((x - mean) ** 2 for x in to_go) / 5 + 1e-8)
    white = [(x - mean) / unit for x in to_go]
    estimator = Whitened(estimator=RewardToGo())
    got = estimator(rewards, torch.full_like(rewards, NAN), mask, groups=torch.tensor([0, 1]), all_sum=local)
    assert_close(got.advantages, float64([white[:3], [*white[3:], 0.0]]), **TIGHT)
    assert_close(got.returns, float64([to_go[:3], [*to_go[3:], 0.0]]), **TIGHT)
    # groups play no part
    again = estimator(rewards, torch.zeros_like(rewards), mask, groups=torch.tensor([4, 4]), all_sum=local)
    assert torch.equal(again.advantages, got.advantages)


def test_whitened_equals_hand_values_and_keeps_returns(float64):
    # bandit advantages 1, 3: mean 2, var 1, so ∓1/√(1 + 1e-8)
    got = credit(Whitened(estimator=BanditAdvantage()), float64([[1.0], [3.0]]))
    scale = 1 / math.sqrt(1 + 1e-8)
    assert_close(got.advantages, float64([[-scale], [scale]]), **TIGHT)
    assert torch.equal(got.returns, float64([[1.0], [3.0]]))


def test_whitened_advantages_have_mean_zero_and_variance_one_over_actions_that_count():
    rewards, values, mask = ragged(5, [6, 1, 3])
    inner, outer = (credit(e, rewards, values, mask) for e in (GAE(lam=0.8), Whitened(estimator=GAE(lam=0.8))))
    inside = outer.advantages[mask]
    assert abs(float(inside.mean())) <= 1e-9
    # var/(var + 1e-8) is 1 to 1e-7
    assert abs(float(inside.var(unbiased=False)) - 1) <= 1e-7
    assert outer.advantages[~mask].eq(0).all()
    assert torch.equal(outer.returns, inner.returns)
    # whitening is affine and increasing, so the order stands; negative control: the inner ones are not centered
    assert torch.equal(inside.argsort(), inner.advantages[mask].argsort())
    assert abs(float(inner.advantages[mask].mean())) > 0.01


def test_whitened_of_two_ranks_equals_one(as_ranks):
    rewards, values, mask = ragged(6, [6, 1, 3])
    parts = (slice(0, 1), slice(1, 3))
    estimator = Whitened(estimator=GAE())

    def work(rank, all_sum):
        rows = parts[rank]
        return credit(estimator, rewards[rows], values[rows], mask[rows], all_sum=all_sum).advantages

    whole = credit(estimator, rewards, values, mask).advantages
    assert_close(torch.cat(as_ranks(work)), whole, **TIGHT)
    apart = torch.cat([credit(estimator, rewards[p], values[p], mask[p]).advantages for p in parts])
    assert (apart - whole).abs().max() > 0.01  # negative control


def test_whitened_needs_a_value_where_the_inner_estimator_does():
    assert Whitened(estimator=GAE()).needs_value
    assert not Whitened(estimator=BanditAdvantage()).needs_value


def test_whitened_forgets_shift_and_scale_and_bandit_does_not():
    # up to ε: var/(var + 1e-8) differs between the two by less than 1e-7
    rewards, values, mask = ragged(8, [6, 1, 3])
    whole = torch.where(mask, 3 * rewards, 0.0)
    white = Whitened(estimator=BanditAdvantage())
    base = credit(white, rewards, values, mask).advantages
    assert_close(credit(white, whole, values, mask).advantages, base, rtol=0, atol=1e-7)
    plain = [credit(BanditAdvantage(), r, values, mask).advantages for r in (rewards, whole)]
    assert_close(plain[1], 3 * plain[0], **TIGHT)


def test_whitened_default_is_gae_and_the_inner_estimator_matters():
    assert Whitened() == Whitened(estimator=GAE(gamma=1.0, lam=0.95))
    rewards, values, mask = ragged(9, [6, 1, 3])
    inner = [GAE(), GAE(lam=0.5), RewardToGo(), BanditAdvantage()]
    got = [credit(Whitened(estimator=e), rewards, values, mask).advantages for e in inner]
    for i in range(4):
        for j in range(i):
            assert (got[i] - got[j]).abs().max() > 0.01


def test_whitened_of_one_number_is_zero(float64):
    # a rollout of equal advantages teaches nothing, and is not NaN; seven times 0.1 in float32 rounds
    assert torch.equal(credit(Whitened(estimator=BanditAdvantage()), float64([[3.0]])).advantages, float64([[0.0]]))
    equal = torch.full((7, 1), 0.1)
    # 1e-3: what the centring leaves of one rounding, 1e-9, over √ε = 1e-4
    assert credit(Whitened(estimator=BanditAdvantage()), equal).advantages.abs().max() <= 1e-3


def test_estimator_is_abstract():
    with pytest.raises(TypeError):
        AdvantageEstimator()
