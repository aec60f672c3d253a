"""Random numbers that depend on nothing but their names."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch

from lightning_rlhf.engines import SamplingParams, row_uniforms

NAME = {"seed": 3, "stream": "train", "iteration": 5, "length": 9}


@pytest.mark.parametrize("world", [2, 3, 8])
def test_numbers_do_not_depend_on_the_processes(world):
    whole = row_uniforms(rows=range(24), **NAME)
    for rank in range(world):
        part = row_uniforms(rows=range(rank, 24, world), **NAME)
        assert torch.equal(part, whole[rank::world])
    assert not torch.equal(row_uniforms(rows=range(1, 13), **NAME), whole[:12])


@pytest.mark.parametrize("change", [{"seed": 4}, {"stream": "eval"}, {"iteration": 6}, {"iteration": 53}])
def test_numbers_differ_by_name(change):
    here, there = row_uniforms(rows=range(12), **NAME), row_uniforms(rows=range(12), **(NAME | change))
    assert not (here == there).any()
    assert torch.equal(here, row_uniforms(rows=range(12), **NAME))


def test_numbers_are_uniform_and_unrelated():
    numbers = row_uniforms(rows=range(2000), **NAME)
    assert numbers.shape == (2000, 9)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < numbers.max() < 1
    count = numbers.numel()
    assert abs(float(numbers.mean()) - 0.5) < 4 * (1 / 12 / count) ** 0.5  # four standard errors
    assert len(numbers.flatten().unique()) == count
    centered = numbers - 0.5
    for lag in (centered[:-1] * centered[1:], centered[:, :-1] * centered[:, 1:]):
        assert abs(float(lag.mean())) < 4 / 12 / lag.numel() ** 0.5


def test_numbers_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    row_uniforms(rows=range(4), **NAME)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": -1.0}])
def test_generation_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)
    assert SamplingParams(max_new_tokens=1, temperature=0.1).for_run(False).seed == 0


def test_names_that_a_generator_of_32_bits_confuses_have_numbers_of_their_own():
    """With 63 bits of BLAKE2b as the seed of torch's CPU generator these two names had the same numbers."""
    one, other = (
        row_uniforms(seed=0, stream="train", iteration=iteration, rows=[row], length=8)
        for iteration, row in ((336, 303), (741, 454))
    )
    assert not torch.equal(one, other)


def test_numbers_are_the_low_bits_of_shake128():
    """By hand, in Python's integers; a longer row begins with the shorter one's numbers."""
    digest = hashlib.shake_128(b"3/train/5/7").digest(24)
    words = [int.from_bytes(digest[i : i + 8], sys.byteorder) for i in (0, 8, 16)]
    expected = [(word % 2**53) / 2**53 for word in words]
    assert row_uniforms(seed=3, stream="train", iteration=5, rows=[7], length=3).tolist() == [expected]
    assert row_uniforms(seed=3, stream="train", iteration=5, rows=[7], length=2).tolist() == [expected[:2]]
