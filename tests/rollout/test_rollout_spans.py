"""Rollouts with an environment's tokens between the policy's, through the network, the text rewards and the groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_rlhf.models import PolicyModel
from lightning_rlhf.models.microbatching import pieces_of
from lightning_rlhf.rewards import Scores
from lightning_rlhf.rewards.text import decoded
from lightning_rlhf.rollout.scored import divided, joined
from lightning_rlhf.types import PromptBatch, Rollout

PROMPTS = [[5, 6, 7], [8, 9]]
RESPONSES = [[11, 12, 20, 21, 13, 0], [14, 22, 15, 0], [16, 0], [17, 18, 23, 0]]
MASKS = [[1, 1, 0, 0, 1, 1], [1, 0, 1, 1], [1, 1], [1, 1, 0, 1]]
ANSWERS = [[13, 0], [15, 0], [16, 0], [0]]


def rollout() -> Rollout:
    """Two responses to each of two prompts, padded."""
    width = max(map(len, RESPONSES))
    tokens, real, chosen = (torch.zeros(4, 3 + width, dtype=torch.long) for _ in range(3))
    for i, (text, mask) in enumerate(zip(RESPONSES, MASKS, strict=True)):
        prompt = PROMPTS[i // 2]
        row = slice(3 - len(prompt), 3 + len(text))
        tokens[i, row], real[i, row] = torch.tensor(prompt + text), 1
        chosen[i, 3 : 3 + len(text)] = torch.tensor(mask)
    numbers = torch.zeros(4, width, dtype=torch.float64)
    return Rollout(
        tokens=tokens,
        attention_mask=real.bool(),
        response_mask=chosen[:, 3:].bool(),
        ended=torch.ones(4, dtype=torch.bool),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        logprobs=numbers,
        sampler_logprobs=numbers,
        ref_logprobs=numbers,
        entropy=numbers,
        values=numbers,
        rewards=torch.where(chosen[:, 3:].bool(), 1.5, 0.0),
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logprobs_are_of_the_policy_s_tokens_after_all_that_stands_before(make_lm, kind):
    network = make_lm(kind).double().eval()
    found = PolicyModel(network).response_logprobs(rollout(), temperature=0.7)
    for i, (text, mask) in enumerate(zip(RESPONSES, MASKS, strict=True)):
        prompt = PROMPTS[i // 2]
        logits = network(input_ids=torch.tensor([prompt + text])).logits[0] / 0.7
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(text)[:, None]).flatten()
        expected = torch.where(torch.tensor(mask).bool(), expected, 0.0)
        torch.testing.assert_close(found[i, : len(text)], expected, rtol=0, atol=1e-9)
        assert not found[i, len(text) :].any()


def test_one_bit_of_the_mask_is_one_log_prob_more(make_lm):
    policy, whole = PolicyModel(make_lm("gpt2").double().eval()), rollout()
    flipped = whole.response_mask.clone()
    flipped[0, 2] = True
    before, after = (
        policy.response_logprobs(replace(whole, response_mask=mask), temperature=1.0).detach()
        for mask in (whole.response_mask, flipped)
    )
    assert before[0, 2] == 0
    assert after[0, 2] != 0
    after[0, 2] = 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_text_reward_reads_the_last_span(make_tokenizer):
    tokenizer = make_tokenizer()
    expected = tokenizer.batch_decode(ANSWERS, skip_special_tokens=True)
    assert decoded(rollout(), tokenizer) == expected


def test_microbatches_have_room_for_the_environment():
    pieces = pieces_of(rollout(), rows=None, tokens=16)
    assert sorted(torch.cat(pieces).tolist()) == [0, 1, 2, 3]
    assert pieces[0].tolist() == [0]  # with row 1 it is 2 · (3 + 6) tokens, of which the policy chose 2 · (3 + 4)


def test_groups_keep_what_the_environment_wrote():
    whole = rollout()
    prompts = PromptBatch(
        torch.tensor([[5, 6, 7], [0, 8, 9]]),
        torch.tensor([[1, 1, 1], [0, 1, 1]]).bool(),
        torch.ones(2).bool(),
        [{}, {}],
    )
    groups = divided(prompts, whole, Scores(torch.arange(4.0), {}), places=[0, 1])
    batch, again, scores = joined(groups, device=torch.device("cpu"))
    assert torch.equal(batch.tokens * batch.mask, prompts.tokens * prompts.mask)
    for name in ("attention_mask", "response_mask", "rewards", "ended"):
        assert torch.equal(getattr(again, name), getattr(whole, name)), name
    assert torch.equal(again.tokens * again.attention_mask, whole.tokens * whole.attention_mask)
    assert scores.total.tolist() == [0, 1, 2, 3]
