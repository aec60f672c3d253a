from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_rlhf.data.loader import BatchSchedule, JointStream, ResumableLoader, Stream, make_loader
from lightning_rlhf.data.sampling_order import FileOrder, ShuffledOrder


def keep(examples: Any, counts: Any) -> list[tuple[str, bool]]:
    return list(zip(examples, counts, strict=True))


def names(size: int, order: Any) -> Stream:
    return Stream([f"row{i}" for i in range(size)], order, keep)


def shuffled(size: int = 10, batch: int = 3) -> Stream:
    return names(size, ShuffledOrder(size, batch_size=batch))


def resumable(num_workers: int = 0, stream: Any = None) -> ResumableLoader:
    return make_loader(ResumableLoader, stream or shuffled(), num_workers=num_workers)


def epochs(loader: Any, *numbers: int) -> list[Any]:
    batches = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        batches += list(loader)
    return batches


def test_schedule_counts_steps_over_epochs_and_keeps_its_length() -> None:
    schedule = BatchSchedule(4)
    assert list(schedule) == [0, 1, 2, 3]
    schedule.set_epoch(2)
    assert list(schedule) == [8, 9, 10, 11]
    schedule.start = 3
    assert list(schedule) == [11]
    assert len(schedule) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_read_on_without_a_gap(num_workers: int) -> None:
    batches = epochs(resumable(num_workers), 0, 1, 2, 3, 4)
    assert len(batches) == 5 * 4
    rows = [name for batch in batches for name, counted in batch if counted]
    for number in range(6):
        assert sorted(rows[10 * number : 10 * number + 10]) == sorted(f"row{i}" for i in range(10))


def test_filler_is_the_row_again_and_does_not_count() -> None:
    stream = names(3, FileOrder(3, batch_size=1, rank=1, world=2))
    assert list(make_loader(DataLoader, stream)) == [[("row1", True)], [("row2", False)]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("served", [0, 1, 3, 4])
def test_resumed_loader_hands_out_what_was_not_yet(num_workers: int, served: int) -> None:
    whole = epochs(resumable(), 3, 4)
    loader = resumable(num_workers)
    loader.sampler.set_epoch(3)
    batches = iter(loader)
    first = [next(batches) for _ in range(served)]
    state = loader.state_dict() if served else {"epoch": 3, "served": 0, "steps": 4}
    del batches

    resumed = resumable(num_workers)
    resumed.load_state_dict(state)
    epoch = resumed.sampler.epoch
    assert epoch == (4 if served == 4 else 3)
    assert first + epochs(resumed, *range(epoch, 5)) == whole


def test_state_says_where_the_next_batch_is() -> None:
    loader = resumable()
    loader.sampler.set_epoch(5)
    batches = iter(loader)
    assert loader.state_dict() == {"epoch": 0, "served": 0, "steps": 4}  # nothing is handed out before the first next()
    next(batches)
    next(batches)
    assert loader.state_dict() == {"epoch": 5, "served": 2, "steps": 4}
    resumed = resumable()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.state_dict() == loader.state_dict()
    next(iter(resumed))
    assert resumed.state_dict() == {"epoch": 5, "served": 3, "steps": 4}
    list(batches)
    assert loader.state_dict() == {"epoch": 6, "served": 0, "steps": 4}
    loader.sampler.set_epoch(6)
    assert loader.state_dict() == {"epoch": 6, "served": 0, "steps": 4}


def test_epoch_cut_short_resumes_with_the_next_from_its_start() -> None:
    loader = resumable()
    next(iter(loader))  # as with limit_train_batches=1
    resumed = resumable()
    resumed.load_state_dict(loader.state_dict())
    assert epochs(resumed, 1) == epochs(resumable(), 1)


def test_iterating_twice_starts_anew() -> None:
    loader = resumable()
    next(iter(loader))
    assert list(loader) == epochs(resumable(), 0)


def test_state_of_other_data_is_refused_in_the_middle_of_an_epoch() -> None:
    loader = resumable()
    with pytest.raises(ValueError, match="stopped after 2 of 9 batches, but an epoch now has 4.*same data, batch size"):
        loader.load_state_dict({"epoch": 1, "served": 2, "steps": 9})
    loader.load_state_dict({"epoch": 1, "served": 0, "steps": 9})
    assert list(loader) == epochs(resumable(), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    list(resumable(num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_joint_streams_keep_step_and_the_first_gives_the_length() -> None:
    prompts, texts = shuffled(10, 3), names(5, ShuffledOrder(5, batch_size=7, stream="pretrain"))
    joint = JointStream({"prompts": prompts, "pretrain": texts})
    batches = epochs(resumable(stream=joint), 0, 1)
    assert len(joint) == 4
    assert [batch["prompts"] for batch in batches] == epochs(resumable(), 0, 1)
    rows = [name for batch in batches for name, _ in batch["pretrain"]]
    assert len(rows) == 8 * 7
    for number in range(11):  # each pass over the texts is whole, across the epochs of the prompts
        assert sorted(rows[5 * number : 5 * number + 5]) == [f"row{i}" for i in range(5)]


class Dying(Dataset):
    """A worker that assembles the third batch is killed."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, step: int) -> int:
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step


def test_dead_worker_is_named_with_what_to_do():
    loader, seen = make_loader(ResumableLoader, Dying(), num_workers=1), []
    with pytest.raises(RuntimeError, match=r"a data worker died after batch \d of epoch 0.*fewer `num_workers`"):
        seen.extend(loader)


def test_error_of_another_kind_is_left_as_it_is():
    class Broken(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, step: int) -> int:
            raise RuntimeError("bad row")

    with pytest.raises(RuntimeError, match="^bad row$"):
        list(make_loader(ResumableLoader, Broken()))
