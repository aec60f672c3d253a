import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from lightning_rlhf.core import (
    GAE,
    K3,
    Algorithm,
    DPPOMask,
    GeometricLevel,
    GroupAdvantage,
    ImportanceSampling,
    KLInLoss,
    LossMask,
    MaskTruncated,
    OffPolicyMask,
    SeqMeanTokenMean,
    SeqMeanTokenSum,
    SequenceLevel,
    TokenLevel,
    TokenMean,
    TopEntropy,
    Whitened,
)
from lightning_rlhf.core.masks import among_largest
from lightning_rlhf.types import Experience, Rollout

TIGHT = {"rtol": 0, "atol": 1e-12}
LENGTHS = torch.tensor([4, 2, 3, 1, 4, 4])
RESPONSE = torch.arange(4) < LENGTHS.unsqueeze(1)
ENDED = torch.tensor([False, True, True, True, False, True])
SCORES = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)


def a_rollout(seed=0, **changes) -> Rollout:
    """Six responses to two prompts; the sampler is not the trainer."""
    numbers = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    old, noise, ref, entropy, values = torch.where(RESPONSE, numbers, 0.0)
    parts = {
        "tokens": torch.ones(6, 5, dtype=torch.int64),
        "attention_mask": torch.cat([torch.ones(6, 1, dtype=torch.bool), RESPONSE], 1),
        "response_mask": RESPONSE,
        "ended": ENDED,
        "prompt_index": torch.tensor([0, 0, 0, 1, 1, 1]),
        "logprobs": -old.abs(),
        "sampler_logprobs": torch.where(RESPONSE, -old.abs() - 0.3 * noise.abs(), 0.0),
        "ref_logprobs": -ref.abs(),
        "entropy": entropy.abs(),
        "values": values,
    }
    return Rollout(**(parts | changes))


def moved(rollout, seed=1):
    """log π_θ after some updates, with a graph."""
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(RESPONSE, rollout.logprobs + 0.5 * noise, 0.0).requires_grad_()


def tokens(**options) -> Algorithm:
    options = {"level": TokenLevel(), "advantage": GroupAdvantage(), "kl_term": KLInLoss(estimator=K3())} | options
    return Algorithm(beta=0.1, **options)


def step(algorithm, rollout, logprobs):
    """Loss of one optimizer step on the whole rollout, its gradient, the experience and what is logged of actions."""
    experience = algorithm.credit(rollout, SCORES)
    found = algorithm.action_loss(logprobs, None, experience)
    count = algorithm.reduction.count(experience.action_mask).clamp(min=1)
    loss = algorithm.reduction.total(found.loss, experience.action_mask) / count
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], experience, found.stats


# What each rule keeps


def test_truncated_responses_leave_losses_and_denominators():
    rollout, level = a_rollout(), SequenceLevel()
    experience = Algorithm(masks=MaskTruncated()).credit(rollout, SCORES)
    assert experience.action_mask.squeeze(1).tolist() == ENDED.tolist()
    assert int(SeqMeanTokenSum().count(experience.action_mask)) == 4
    by_token = tokens(masks=MaskTruncated()).credit(rollout, SCORES).action_mask
    assert torch.equal(by_token, RESPONSE & ENDED.unsqueeze(1))
    assert (int(TokenMean().count(by_token)), int(SeqMeanTokenMean().count(by_token))) == (10, 4)
    # negative control
    assert Algorithm().credit(rollout, SCORES).action_mask.all()
    assert torch.equal(level.mask(RESPONSE), torch.ones(6, 1, dtype=torch.bool))


@pytest.mark.parametrize("reduction", [TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean()], ids=repr)
def test_step_without_truncated_responses_is_that_of_the_others_with_the_advantages_of_all(reduction):
    rollout = a_rollout()
    logprobs = moved(rollout)
    plain, masked = tokens(reduction=reduction), tokens(reduction=reduction, masks=MaskTruncated())
    loss, gradient, experience, _ = step(masked, rollout, logprobs)
    whole = plain.credit(rollout, SCORES)
    assert torch.equal(experience.advantages, whole.advantages)
    rest = whole.select(ENDED.nonzero().squeeze(1))
    found = plain.action_loss(logprobs[ENDED], None, rest)
    expected = reduction.total(found.loss, rest.action_mask) / reduction.count(rest.action_mask)
    assert_close(loss, expected.detach(), **TIGHT)
    assert_close(gradient, torch.autograd.grad(expected, logprobs)[0], **TIGHT)
    assert gradient[~ENDED].eq(0).all()
    # negative control: the advantages are not those of the rest alone, nor the loss that of all
    assert abs(float(step(plain, rollout, logprobs)[0] - loss)) > 1e-3
    alone = plain.credit(rollout.select(ENDED.nonzero().squeeze(1)), SCORES[ENDED])
    assert (alone.advantages - rest.advantages).abs().max() > 0.01


@pytest.mark.parametrize("level", [TokenLevel(), SequenceLevel(), GeometricLevel()], ids=repr)
@pytest.mark.parametrize("reduction", [TokenMean(), SeqMeanTokenSum(), SeqMeanTokenMean()], ids=repr)
@pytest.mark.parametrize("advantage", [GroupAdvantage(), Whitened(estimator=GroupAdvantage())], ids=repr)
def test_rollout_of_truncated_responses_alone_has_loss_and_gradient_zero(level, reduction, advantage):
    rollout = a_rollout(ended=torch.zeros(6, dtype=torch.bool))
    algorithm = tokens(level=level, reduction=reduction, advantage=advantage, masks=MaskTruncated())
    loss, gradient, experience, _ = step(algorithm, rollout, moved(rollout))
    assert float(loss) == 0.0
    assert gradient.eq(0).all()
    assert not experience.action_mask.any()
    assert experience.advantages.isfinite().all()


def test_tokens_of_highest_entropy_alone_are_in_the_policy_loss():
    """18 tokens with a share of 0.3: 1 + ⌊0.3·17⌋ = 6 of them. Denominators and the KL in the loss stay."""
    rollout = a_rollout()
    logprobs = moved(rollout)
    plain, masked = tokens(), tokens(masks=TopEntropy(share=0.3))
    _, _, experience, stats = step(masked, rollout, logprobs)
    highest = rollout.entropy[RESPONSE].sort(descending=True).values[:6]
    expected = RESPONSE & (rollout.entropy >= highest[-1])
    assert torch.equal(experience.kept, expected)
    assert torch.equal(experience.action_mask, RESPONSE)
    assert_close(stats["policy/masked"][RESPONSE].mean(), torch.tensor(12 / 18, dtype=torch.float64), **TIGHT)
    without = step(plain, rollout, logprobs)[3]
    assert_close(stats["loss/policy_avg"], torch.where(expected, without["loss/policy_avg"], 0.0), **TIGHT)
    assert torch.equal(stats["loss/kl_avg"], without["loss/kl_avg"])
    assert without["loss/policy_avg"][RESPONSE & ~expected].abs().max() > 0.1  # negative control
    assert "policy/masked" not in without


def test_minibatches_keep_the_tokens_of_the_whole_rollout():
    algorithm = tokens(masks=[TopEntropy(share=0.3), MaskTruncated()])
    rollout = a_rollout()
    logprobs, whole = moved(rollout), algorithm.credit(rollout, SCORES)
    losses = algorithm.action_loss(logprobs, None, whole).loss
    for rows in ([0, 1, 2], [3, 1], [4]):
        index = torch.tensor(rows)
        part = whole.select(index)
        width = part.kept.shape[1]
        assert torch.equal(part.kept, whole.kept[index, :width])
        found = algorithm.action_loss(logprobs[index, :width], None, part).loss
        assert torch.equal(found[part.action_mask], losses[index, :width][part.action_mask])
    # truncated responses are not among what the entropy is compared with: ⌊0.3·9⌋ + 1 of 10 tokens
    assert int(whole.kept.sum()) == 3
    # negative control: a threshold of a minibatch alone would keep others
    alone = algorithm.credit(rollout.select(torch.tensor([1, 2])), SCORES[1:3])
    assert not torch.equal(alone.kept, whole.kept[1:3, :3])


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-30, 0.1, 0.5, 0.5000001, 1.0, 3.7, 11.0]), min_size=1, max_size=30),
    st.floats(0.01, 1.0),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_largest_are_those_of_a_sorted_list_with_their_ties(numbers, share, seed):
    values = torch.tensor(numbers, dtype=torch.float32)
    mask = torch.rand(len(numbers), generator=torch.Generator().manual_seed(seed)) < 0.7
    calls = []
    found = among_largest(values, mask, share=share, all_sum=lambda x: calls.append(1) or x)
    chosen = sorted(values[mask].tolist(), reverse=True)
    wanted = 1 + (len(chosen) - 1) * round(share * 10**9) // 10**9
    expected = [
        mask and number >= chosen[wanted - 1] for number, mask in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    assert (found & mask).tolist() == expected
    assert len(calls) == 4


def test_two_processes_keep_what_one_keeps():
    """Each asks for the sums of both, in turn: a run of one is replayed with the sums of the other known."""
    values = a_rollout().entropy * torch.tensor([[1], [1], [1], [1], [5], [5]])
    together = among_largest(values, RESPONSE, share=0.4, all_sum=lambda x: x)
    halves = [slice(0, 4), slice(4, 6)]
    known: list[torch.Tensor] = []
    for _ in range(4):  # one more sum is known each time
        asked = []
        for half in halves:
            found: list[torch.Tensor] = []

            def all_sum(x, found=found):
                found.append(x)
                return known[len(found) - 1] if len(found) <= len(known) else x

            among_largest(values[half], RESPONSE[half], share=0.4, all_sum=all_sum)
            asked.append(found[len(known)])
        known.append(asked[0] + asked[1])
    sums = [iter(known), iter(known)]
    parts = [
        among_largest(values[half], RESPONSE[half], share=0.4, all_sum=lambda x, of=of: next(of))
        for half, of in zip(halves, sums, strict=True)
    ]
    assert torch.equal(torch.cat(parts) & RESPONSE, together & RESPONSE)
    # negative control: each alone keeps others
    alone = [among_largest(values[half], RESPONSE[half], share=0.4, all_sum=lambda x: x) for half in halves]
    assert not torch.equal(torch.cat(alone) & RESPONSE, together & RESPONSE)


def test_a_share_of_one_changes_no_bit():
    rollout = a_rollout()
    for one, other in zip(
        step(tokens(masks=TopEntropy(share=1.0)), rollout, moved(rollout))[:2],
        step(tokens(), rollout, moved(rollout))[:2],
        strict=True,
    ):
        assert torch.equal(one, other)


def experience_of(advantages, now, sampler, *, response=None) -> tuple[torch.Tensor, Experience]:
    """log π_θ and what a mask needs to know, from probabilities."""
    now, sampler, advantages = (torch.tensor(x, dtype=torch.float64) for x in (now, sampler, advantages))
    response = torch.ones_like(now, dtype=torch.bool) if response is None else torch.tensor(response)
    rows, width = now.shape
    zeros = torch.zeros_like(now)
    rollout = Rollout(
        tokens=torch.zeros(rows, width + 1, dtype=torch.int64),
        attention_mask=torch.ones(rows, width + 1, dtype=torch.bool),
        response_mask=response,
        ended=torch.ones(rows, dtype=torch.bool),
        prompt_index=torch.zeros(rows, dtype=torch.int64),
        logprobs=zeros - 9.0,  # π_old is not asked
        sampler_logprobs=sampler.log(),
        ref_logprobs=zeros,
        entropy=zeros,
        values=zeros,
    )
    mask = response if advantages.shape == response.shape else response.any(1, keepdim=True)
    return now.log(), Experience(
        rollout=rollout, action_mask=mask, rewards=zeros, penalties=zeros, advantages=advantages, returns=zeros
    )


def test_off_policy_mask_equals_hand_values():
    """Mean of log π_sampler − log π_θ: ½·(log 4 + log 1) = log 2 of the first two rows, log ½ of the third."""
    now, sampler = [[0.1, 0.5], [0.1, 0.5], [0.8, 0.8], [0.1, 0.9]], [[0.4, 0.5], [0.4, 0.5], [0.4, 0.4], [0.4, 0.1]]
    response = [[True, True], [True, True], [True, True], [True, False]]
    for threshold, expected in ((0.69, [False, True, True, False]), (0.70, [True, True, True, False])):
        for width in (1, 2):
            advantages = [[x] * width for x in (-1.0, 1.0, -1.0, -1.0)]
            logprobs, experience = experience_of(advantages, now, sampler, response=response)
            kept = OffPolicyMask(threshold=threshold).kept_by(logprobs, experience)
            counted = experience.action_mask
            assert torch.equal(kept, counted & torch.tensor(expected).unsqueeze(1))
    assert math.log(4) > 0.70  # of the last row, whose second token is padding and would make up for it


def test_dppo_mask_equals_hand_values():
    """Dropped: Â > 0 and raised by more than 0.15, Â < 0 and lowered by more. Rare tokens may move by any factor."""
    now = [[0.50, 0.50, 0.34, 0.10, 0.80, 0.12, 0.99]]
    sampler = [[0.30, 0.30, 0.20, 0.01, 0.99, 0.30, 0.30]]
    up, down = [[1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 0.0]], [[-1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0]]
    for advantages, expected in (
        (up, [False, True, True, True, True, True, True]),
        (down, [True, False, True, True, False, False, True]),
    ):
        assert DPPOMask().kept_by(*experience_of(advantages, now, sampler)).tolist() == [expected]
    assert DPPOMask(threshold=0.13).kept_by(*experience_of(up, now, sampler)).tolist()[0][2] is False
    assert DPPOMask(threshold=1.0).kept_by(*experience_of(up, now, sampler)).all()


def test_dropped_tokens_have_no_gradient_of_the_policy_loss_but_that_of_the_kl():
    rollout = a_rollout()
    logprobs = moved(rollout, seed=3)
    for mask in (DPPOMask(threshold=0.05), OffPolicyMask(threshold=0.05)):
        plain, masked = (tokens(surrogate=ImportanceSampling(), masks=masks) for masks in (None, mask))
        (_, before, experience, _), (_, gradient, _, stats) = (step(a, rollout, logprobs) for a in (plain, masked))
        dropped = stats["policy/masked"].bool() & RESPONSE
        assert 0 < int(dropped.sum()) < 18
        assert_close(gradient[~dropped], before[~dropped], **TIGHT)
        kl = masked.kl_term.in_loss(logprobs, rollout.ref_logprobs, rollout.sampler_logprobs, RESPONSE, TokenLevel())
        of_kl = 0.1 * torch.autograd.grad(kl.sum(), logprobs)[0] / 18
        assert_close(gradient[dropped], of_kl[dropped], **TIGHT)
        assert (before - gradient)[dropped].abs().min() > 1e-6  # negative control
        assert torch.equal(experience.action_mask, RESPONSE)


def test_value_loss_and_kl_of_dropped_tokens_stay():
    rollout = a_rollout()
    logprobs, values = moved(rollout), rollout.values + 0.3
    losses = []
    for masks in (None, TopEntropy(share=0.3)):
        algorithm = tokens(advantage=GAE(), masks=masks)
        found = algorithm.action_loss(logprobs, values, algorithm.credit(rollout, SCORES))
        losses.append(found.loss - found.stats["loss/policy_avg"])
        assert found.stats["loss/value_avg"][RESPONSE].abs().min() > 1e-4
    assert_close(*losses, **TIGHT)


# Together with the rest


def test_several_rules_keep_what_all_keep():
    rollout = a_rollout()
    logprobs = moved(rollout, seed=3)
    rules = [TopEntropy(share=0.6), DPPOMask(threshold=0.05), OffPolicyMask(threshold=0.1)]
    together = step(tokens(masks=rules), rollout, logprobs)[3]["policy/masked"]
    alone = [step(tokens(masks=rule), rollout, logprobs)[3]["policy/masked"] for rule in rules]
    assert torch.equal(together, torch.stack(alone).amax(0))
    assert len({tuple(x.flatten().tolist()) for x in (together, *alone)}) == 4


def test_a_rule_of_ones_own_needs_one_hook():
    class FirstToken(LossMask):
        def counted(self, rollout):
            return rollout.response_mask & (rollout.response_mask.cumsum(1) == 1)

    experience = tokens(masks=FirstToken()).credit(a_rollout(), SCORES)
    assert experience.action_mask.sum(1).tolist() == [1] * 6
    assert LossMask().counted(a_rollout()) is not None


def test_masks_of_yaml_are_a_tuple():
    rules = [MaskTruncated(), TopEntropy()]
    assert Algorithm(level=TokenLevel(), masks=rules).masks == tuple(rules)
    assert Algorithm(level=TokenLevel(), masks=rules).loss_masks == tuple(rules)
    assert Algorithm(masks=MaskTruncated()).loss_masks == (MaskTruncated(),)
    assert Algorithm().loss_masks == Algorithm(masks=()).loss_masks == ()
    with pytest.raises(TypeError, match="`masks` must be"):
        Algorithm(masks="MaskTruncated")


def test_no_mask_leaves_the_experience_as_it_was():
    experience = tokens().credit(a_rollout(), SCORES)
    assert experience.kept is None
    assert experience.select(torch.tensor([1])).kept is None
    assert replace(experience, kept=experience.action_mask).select(torch.tensor([1])).kept.shape == (1, 2)


@pytest.mark.parametrize("mask", [TopEntropy(), DPPOMask()], ids=repr)
@pytest.mark.parametrize("level", [SequenceLevel(), GeometricLevel()], ids=repr)
def test_rules_on_tokens_are_refused_where_actions_are_responses(mask, level):
    with pytest.raises(ValueError, match=f"{type(mask).__name__} chooses tokens, but an action of"):
        Algorithm(level=level, masks=[MaskTruncated(), mask])
    Algorithm(level=level, masks=[MaskTruncated(), OffPolicyMask(threshold=0.5)])


def test_numbers_out_of_range_are_refused():
    for bad in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="`share` must be above 0 and at most 1"):
            TopEntropy(share=bad)
        with pytest.raises(ValueError, match="`threshold` must be above 0 and at most 1"):
            DPPOMask(threshold=bad)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`threshold` must be a number above 0"):
            OffPolicyMask(threshold=bad)
