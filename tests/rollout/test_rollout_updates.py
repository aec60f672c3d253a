"""Which sequences each optimizer step learns from."""

from __future__ import annotations

import pytest
import torch

from lightning_rlhf.rollout import UpdateSchedule
from lightning_rlhf.types import Experience, Rollout


@pytest.fixture
def experience() -> Experience:
    """Twelve rows; every field of row i says i."""
    number = torch.arange(12.0).unsqueeze(1)
    rollout = Rollout(
        tokens=number.expand(-1, 3).long(),
        attention_mask=torch.ones(12, 3, dtype=torch.bool),
        response_mask=torch.ones(12, 2, dtype=torch.bool),
        ended=number.squeeze(1) % 2 == 0,
        prompt_index=number.squeeze(1).long(),
        logprobs=number.expand(-1, 2),
        sampler_logprobs=number.expand(-1, 2),
        ref_logprobs=number.expand(-1, 2),
        entropy=number.expand(-1, 2),
        values=number.expand(-1, 2),
    )
    return Experience(
        rollout=rollout,
        action_mask=torch.ones(12, 1, dtype=torch.bool),
        rewards=number,
        penalties=number,
        advantages=number,
        returns=number,
    )


@pytest.fixture
def texts(right_padded):
    def make(count: int):
        return right_padded([[10 + i, 11, 0] for i in range(count)])

    return make


def rows(experience: Experience) -> list[int]:
    return experience.advantages.squeeze(1).int().tolist()


def firsts(text) -> list[int]:
    return [] if text is None else (text.tokens[:, 0] - 10).tolist()


def test_minibatches_partition_every_epoch(experience):
    updates = UpdateSchedule(epochs=3, minibatch=4)
    served = [rows(part) for part, _ in updates.minibatches(experience, None, seed=0)]
    assert len(served) == updates.steps(12) == 9
    epochs = [sum(served[i : i + 3], []) for i in (0, 3, 6)]
    assert epochs[0] == list(range(12))  # in the order of the loader, which has shuffled
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert {len(part) for part in served} == {4}


def test_minibatch_keeps_its_rows_together(experience):
    for part, _ in UpdateSchedule(epochs=2, minibatch=3).minibatches(experience, None, seed=1):
        expected = rows(part)
        for field in (part.returns, part.rollout.logprobs, part.rollout.ref_logprobs, part.rollout.values):
            assert field[:, 0].int().tolist() == expected
        assert part.rollout.tokens[:, 0].tolist() == expected
        assert part.rollout.ended.tolist() == [i % 2 == 0 for i in expected]


def test_permutation_depends_on_the_seed_alone(experience):
    def order(seed):
        return [
            rows(part) for part, _ in UpdateSchedule(epochs=2, minibatch=4).minibatches(experience, None, seed=seed)
        ]

    torch.manual_seed(0)
    first = order(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    assert order(0) == first
    assert torch.equal(torch.rand(1), before)  # and leaves the global generator alone
    assert order(1) != first


def test_whole_rollout_is_one_minibatch(experience):
    assert [rows(part) for part, _ in UpdateSchedule().minibatches(experience, None, seed=0)] == [list(range(12))]


@pytest.mark.parametrize("count", [12, 7, 2])
def test_texts_are_shared_out(experience, texts, count):
    served = [
        firsts(text) for _, text in UpdateSchedule(epochs=2, minibatch=4).minibatches(experience, texts(count), seed=0)
    ]
    for epoch in (served[:3], served[3:]):
        assert sum(epoch, []) == list(range(count))
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1


@pytest.mark.parametrize(("microbatch", "sizes"), [(None, [12]), (5, [5, 5, 2]), (12, [12]), (50, [12]), (1, [1] * 12)])
def test_microbatches_partition_a_minibatch(experience, microbatch, sizes):
    pieces = UpdateSchedule(microbatch=microbatch).microbatches(experience)
    assert [len(piece) for piece in pieces] == sizes
    assert sum((rows(piece) for piece in pieces), []) == list(range(12))


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [
        ({}, [7]),
        ({"microbatch": 3}, [3, 2, 2]),
        ({"microbatch_tokens": 6}, [2, 2, 2, 1]),  # texts of three tokens
        ({"microbatch_tokens": 2}, [1] * 7),
    ],
)
def test_texts_have_microbatches_of_their_own(texts, limit, sizes):
    """However few the responses are."""
    pieces = UpdateSchedule(**limit).text_microbatches(texts(7))
    assert [len(piece.tokens) for piece in pieces] == sizes
    assert sum((firsts(piece) for piece in pieces), []) == list(range(7))
    assert UpdateSchedule(**limit).text_microbatches(None) == []


def test_texts_and_rows_that_come_again_count_once(experience, texts):
    pieces = UpdateSchedule().text_microbatches(texts(2), lambda count: 3)
    assert [int(piece.target.sum()) for piece in pieces] == [2, 2, 0]
    few = experience.select(torch.tensor([3, 5]))
    pieces = UpdateSchedule().microbatches(few, lambda count: 4)
    assert sum(int(piece.action_mask.sum()) for piece in pieces) == 2
    assert [len(piece) for piece in pieces] == [1, 1, 1, 1]


@pytest.mark.parametrize(("world", "samples"), [(2, 1), (3, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("minibatch", [12, 24, 36])
def test_processes_together_cut_the_minibatches_of_one(world, samples, minibatch):
    """In every epoch; prompts are dealt to the processes in turn, with all of their responses."""
    if 72 % (world * samples) or minibatch % world:
        pytest.skip("does not divide")

    def experience_of(places: list[int], prompts: list[int]) -> Experience:
        number = torch.tensor(places, dtype=torch.float64).unsqueeze(1)
        full = torch.ones(len(places), 2, dtype=torch.bool)
        names = ("logprobs", "sampler_logprobs", "ref_logprobs", "entropy", "values")
        rollout = Rollout(
            tokens=full.long(),
            attention_mask=full,
            response_mask=full[:, :1],
            ended=full[:, 0],
            prompt_index=torch.tensor(prompts),
            **{name: number for name in names},
        )
        return Experience(
            rollout=rollout,
            action_mask=full[:, :1],
            rewards=number,
            penalties=number,
            advantages=number,
            returns=number,
        )

    def served(rank: int, world: int) -> list[set[int]]:
        prompts = range(rank, 72 // samples, world)
        places = [prompt * samples + i for prompt in prompts for i in range(samples)]
        groups = [number for number, _ in enumerate(prompts) for _ in range(samples)]
        updates = UpdateSchedule(epochs=3, minibatch=minibatch // world)
        parts = updates.minibatches(experience_of(places, groups), None, seed=5, rank=rank, world=world)
        return [set(part.advantages[part.action_mask].int().tolist()) for part, _ in parts]

    alone, together = served(0, 1), [served(rank, world) for rank in range(world)]
    assert [set().union(*parts) for parts in zip(*together, strict=True)] == alone
    assert all(sum(map(len, parts)) == minibatch for parts in zip(*together, strict=True))
    assert len({frozenset(part) for part in alone}) == len(alone) or minibatch == 72


def test_process_without_a_row_in_a_minibatch_learns_nothing(experience):
    parts = [
        part for part, _ in UpdateSchedule(epochs=4, minibatch=1).minibatches(experience, None, seed=0, rank=1, world=2)
    ]
    assert all(len(part) >= 1 for part in parts)
    assert any(not part.action_mask.any() for part in parts[12:])
    assert all(part.action_mask.all() for part in parts[:12])
    assert sum(int(part.action_mask.sum()) for part in parts) == 4 * 12


@pytest.mark.parametrize(("minibatch", "nearest"), [(5, "[46]"), (7, "6"), (11, "12")])
def test_minibatch_that_does_not_divide_is_refused(minibatch, nearest):
    with pytest.raises(ValueError, match=f"minibatch={minibatch} for 12 sequences; use {nearest}"):
        UpdateSchedule(minibatch=minibatch).steps(12)


def test_minibatch_larger_than_the_rollout_takes_all_of_it():
    assert UpdateSchedule(minibatch=24, epochs=3).steps(12) == UpdateSchedule(epochs=3).steps(12) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"minibatch": 0}, {"microbatch": -1}, {"max_grad_norm": 0.0}, {"max_grad_norm": float("nan")}],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UpdateSchedule(**wrong)


def test_pieces_are_halved_until_there_are_as_many_as_elsewhere(experience):
    """Another process needs five passes where this one needs two; every row stays in one of them."""
    asked = []

    def agree(count: int) -> int:
        asked.append(count)
        return 5

    pieces = UpdateSchedule(microbatch=8).split(experience.rollout, agree)
    assert asked == [2]
    assert sorted(map(len, pieces)) == [2, 2, 2, 2, 4]
    assert sorted(row for piece in pieces for row in piece.tolist()) == list(range(12))
    assert [len(piece) for piece in UpdateSchedule(microbatch=8).split(experience.rollout)] == [8, 4]  # alone


def test_single_rows_come_again_where_more_passes_are_needed(experience):
    """As in evaluation, where the last batch of a process may be shorter than another's."""
    pieces = UpdateSchedule().split(experience.rollout.select(torch.tensor([0, 1])), lambda count: 3)
    assert [len(piece) for piece in pieces] == [1, 1, 1]
    assert {row for piece in pieces for row in piece.tolist()} == {0, 1}
