"""Rows of similar length go together, within their limits, and none is lost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.models.microbatching import at_least, pieces_of
from lightning_rlhf.rollout import UpdateSchedule
from lightning_rlhf.types import Experience, Rollout


def rollout_of(prompts: list[int], responses: list[int], groups: list[int] | None = None) -> Rollout:
    """Rows of these lengths; every token says its row."""
    before, width = max(prompts), max(responses)
    columns = torch.arange(before + width)
    p, r = torch.tensor(prompts).unsqueeze(1), torch.tensor(responses).unsqueeze(1)
    attention = (columns >= before - p) & (columns < before + r)
    response = attention[:, before:]
    rows = torch.arange(len(prompts)).unsqueeze(1)
    numbers = torch.where(response, rows + 1.0, 0.0)
    return Rollout(
        tokens=torch.where(attention, rows, -1),
        attention_mask=attention,
        response_mask=response,
        ended=torch.ones(len(prompts), dtype=torch.bool),
        prompt_index=torch.tensor(groups or list(range(len(prompts)))),
        logprobs=numbers,
        sampler_logprobs=numbers,
        ref_logprobs=numbers,
        entropy=numbers,
        values=numbers,
    )


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.integers(0, 4)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.none() | st.integers(1, 7), st.none() | st.integers(1, 90))
def test_pieces_partition_the_rows_within_their_limits(sizes, rows, tokens):
    prompts, responses, groups = (list(x) for x in zip(*sizes, strict=True))
    rollout = rollout_of(prompts, responses, groups)
    pieces = pieces_of(rollout, rows=rows, tokens=tokens)
    assert sorted(torch.cat(pieces).tolist()) == list(range(len(sizes)))
    for piece in pieces:
        assert rows is None or len(piece) <= rows
        assert tokens is None or len(piece) == 1 or rollout.select(piece).tokens.numel() <= tokens
    if rows is None and tokens is None:
        assert len(pieces) == 1


def test_similar_lengths_go_together_longest_first():
    rollout = rollout_of([3] * 6, [2, 20, 4, 19, 3, 18])
    assert [piece.tolist() for piece in pieces_of(rollout, rows=3, tokens=None)] == [[1, 3, 5], [2, 4, 0]]
    spent = sum(rollout.select(piece).tokens.numel() for piece in pieces_of(rollout, rows=3, tokens=None))
    assert spent == 3 * 23 + 3 * 7  # in their own order it would be 6 rows of 23


def test_responses_to_a_prompt_stay_together():
    rollout = rollout_of([3, 4, 3, 4], [2, 20, 30, 19], [5, 9, 5, 9])
    assert [piece.tolist() for piece in pieces_of(rollout, rows=2, tokens=None)] == [[0, 2], [1, 3]]


def test_a_budget_of_tokens_takes_more_short_rows():
    rollout = rollout_of([2] * 8, [18, 18, 3, 3, 3, 3, 3, 3])
    pieces = [piece.tolist() for piece in pieces_of(rollout, rows=None, tokens=40)]
    assert pieces == [[0, 1], [2, 3, 4, 5, 6, 7]]
    assert [piece.tolist() for piece in pieces_of(rollout, rows=None, tokens=10)][0] == [0]  # too long goes alone


def test_selected_rows_lose_only_padding():
    rollout = rollout_of([2, 5, 3], [4, 1, 2])
    part = rollout.select(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [[2, 2, 2, 2, 2, -1, -1], [-1, 0, 0, 0, 0, 0, 0]]
    assert part.response_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert part.logprobs.tolist() == [[3.0, 3.0, 0.0, 0.0], [1.0] * 4]
    assert part.prompt_width == 3
    assert part.logprobs_with_grad is None


@pytest.mark.parametrize("per_token", [True, False])
def test_experience_is_cut_with_its_rollout(per_token):
    rollout = rollout_of([2, 5, 3], [4, 1, 2])
    mask = rollout.response_mask if per_token else torch.ones(3, 1, dtype=torch.bool)
    numbers = torch.arange(3.0).unsqueeze(1).expand(mask.shape)
    part = Experience(
        rollout=rollout, action_mask=mask, rewards=numbers, penalties=numbers, advantages=numbers, returns=numbers
    ).select(torch.tensor([1, 2]))
    assert part.action_mask.shape == part.advantages.shape == part.returns.shape == (2, 2 if per_token else 1)
    assert part.advantages[:, 0].tolist() == [1.0, 2.0]


def test_pieces_of_the_first_epoch_are_its_microbatches():
    rollout = rollout_of([2, 5, 3, 1, 4, 2], [4, 1, 2, 9, 3, 5])
    numbers = torch.arange(6.0).unsqueeze(1)
    mask = torch.ones(6, 1, dtype=torch.bool)
    experience = Experience(
        rollout=rollout, action_mask=mask, rewards=numbers, penalties=numbers, advantages=numbers, returns=numbers
    )
    updates = UpdateSchedule(minibatch=3, microbatch=2)
    served = [
        piece.advantages[:, 0].int().tolist()
        for minibatch, _ in updates.minibatches(experience, None, seed=0)
        for piece in updates.microbatches(minibatch)
    ]
    assert [piece.tolist() for piece in updates.pieces(rollout)] == served == [[0, 1], [2], [3, 4], [5]]


def test_two_limits_are_refused():
    with pytest.raises(ValueError, match="microbatch=2 and microbatch_tokens=9; leave one out"):
        UpdateSchedule(microbatch=2, microbatch_tokens=9)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([3, 2], 1, [[0, 1, 2], [3, 4]]),  # never fewer
        ([3, 2], 2, [[0, 1, 2], [3, 4]]),
        ([3, 2], 3, [[0, 1], [2], [3, 4]]),
        ([3, 2], 4, [[0], [1], [2], [3, 4]]),
        ([3, 2], 5, [[0], [1], [2], [3], [4]]),
        ([1, 1], 4, [[0], [0], [0], [1]]),
    ],
)
def test_more_pieces_are_as_many_as_asked_for(sizes, count, expected):
    pieces = list(torch.arange(sum(sizes)).split(sizes))
    assert [piece.tolist() for piece in at_least(pieces, count)] == expected


def test_minibatch_comes_in_as_many_pieces_as_agreed_on():
    rollout = rollout_of([1] * 6, [2, 3, 4, 5, 6, 7])
    asked = []

    def agree(count):
        asked.append(count)
        return count + 1

    pieces = UpdateSchedule(microbatch=3).split(rollout, agree)
    assert asked == [2]
    assert sorted(len(piece) for piece in pieces) == [1, 2, 3]
    assert sorted(int(row) for piece in pieces for row in piece) == [0, 1, 2, 3, 4, 5]
    assert len(UpdateSchedule(microbatch=3).split(rollout)) == 2
