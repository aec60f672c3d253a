from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlhf.data.sampling_order import FileOrder, ShuffledOrder

sizes, batches, worlds, seeds = st.integers(1, 23), st.integers(1, 7), st.integers(1, 4), st.integers(0, 5)


@given(size=sizes, batch=batches, world=worlds, seed=seeds, step=st.integers(0, 30))
def test_ranks_deal_out_the_batch_of_one_process(size: int, batch: int, world: int, seed: int, step: int) -> None:
    whole = ShuffledOrder(size, batch_size=batch * world, seed=seed)(step)
    parts = [ShuffledOrder(size, batch_size=batch, rank=rank, world=world, seed=seed)(step) for rank in range(world)]
    assert [len(part) for part in parts] == [batch] * world
    assert [parts[i % world][i // world] for i in range(batch * world)] == whole


@given(size=sizes, batch=batches, seed=seeds, passes=st.integers(1, 4))
def test_each_pass_holds_every_row_once(size: int, batch: int, seed: int, passes: int) -> None:
    order = ShuffledOrder(size, batch_size=batch, seed=seed)
    rows = [row for step in range(size * passes // batch + 1) for row in order(step)]
    for number in range(passes):
        assert sorted(rows[number * size : (number + 1) * size]) == list(range(size))


@given(size=sizes, batch=batches, world=worlds)
def test_an_epoch_is_just_long_enough_for_every_row(size: int, batch: int, world: int) -> None:
    steps = ShuffledOrder(size, batch_size=batch, world=world).steps
    assert (steps - 1) * batch * world < size <= steps * batch * world


def test_order_depends_on_seed_stream_and_pass_alone() -> None:
    def rows(order: ShuffledOrder, steps: range) -> list[int]:
        return [row for step in steps for row in order(step)]

    order = ShuffledOrder(20, batch_size=5, seed=1, stream="train")
    first, second = rows(order, range(4)), rows(order, range(4, 8))
    assert first != second  # another pass
    assert rows(order, range(4)) == first  # reading on leaves no trace
    assert rows(ShuffledOrder(20, batch_size=5, seed=1, stream="train"), range(4, 8)) == second
    assert rows(ShuffledOrder(20, batch_size=4, seed=1, stream="train"), range(5)) == first
    assert rows(ShuffledOrder(20, batch_size=5, seed=2, stream="train"), range(4)) != first
    assert rows(ShuffledOrder(20, batch_size=5, seed=1, stream="pretrain"), range(4)) != first
    assert first != sorted(first)


@given(size=sizes, batch=batches, world=worlds)
def test_evaluation_covers_each_row_once_in_file_order(size: int, batch: int, world: int) -> None:
    orders = [FileOrder(size, batch_size=batch, rank=rank, world=world) for rank in range(world)]
    assert len({order.steps for order in orders}) == 1
    parts = [[order(step) for order in orders] for step in range(orders[0].steps)]
    assert all(0 < len(part) <= batch for step in parts for part in step)
    assert sorted(row for step in parts for part in step for row in part if row >= 0) == list(range(size))
    assert all(part == sorted(part) for step in parts for part in step)


def test_empty_rank_gets_a_filler() -> None:
    first, second, third = (FileOrder(7, batch_size=2, rank=rank, world=3) for rank in range(3))
    assert [first(0), second(0), third(0)] == [[0, 3], [1, 4], [2, 5]]
    assert [first(1), second(1), third(1)] == [[6], [~6], [~6]]


@pytest.mark.parametrize("step", [0, 1])
def test_evaluation_is_the_same_in_every_epoch(step: int) -> None:
    order = FileOrder(7, batch_size=2, rank=0, world=3)
    assert order(step) == order(step + 2) == order(step + 4)
