from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch


@pytest.fixture(scope="session")
def float64():
    """Float64 tensors, the dtype in which the mathematics is checked."""

    def make(values, requires_grad=False):
        return torch.tensor(values, dtype=torch.float64, requires_grad=requires_grad)

    return make


@pytest.fixture(scope="session")
def as_ranks():
    """Runs `work(rank, all_sum)` on every rank at once; `all_sum` adds over the ranks, as an all-reduce does."""

    def run(work, world=2):
        barrier = Barrier(world, timeout=20)
        slots = [None] * world

        def one(rank):
            def all_sum(x):
                slots[rank] = x
                barrier.wait()
                total = sum(slots[1:], slots[0])
                barrier.wait()
                return total

            return work(rank, all_sum)

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(one, range(world)))

    return run
