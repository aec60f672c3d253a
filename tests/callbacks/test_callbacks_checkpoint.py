"""Checkpoints: when they are written, whether they are whole, and what they hold."""

from __future__ import annotations

import csv
import logging
import os
import resource
import signal
import tempfile
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from gathered import gathered
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.checkpoint.api import CheckpointException

from lightning_rlhf.callbacks import RunCheckpoint, checked_io
from lightning_rlhf.callbacks import checkpoint as room
from lightning_rlhf.callbacks.torn import defect
from lightning_rlhf.core import ConstantSchedule
from lightning_rlhf.engines import SamplingParams
from lightning_rlhf.modules import PPOModule
from lightning_rlhf.rewards import ModuleReward
from lightning_rlhf.rollout import UpdateSchedule

RAGGED = [[12, 13], [10], [14, 15, 16, 11], [17]]


class Act(Callback):
    """Does something when a rollout begins."""

    def __init__(self, actions) -> None:
        self.actions = actions

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.actions.get(pl_module.iteration, lambda: None)()


@pytest.fixture
def batches(as_loader, left_padded):
    return lambda count: as_loader([{"prompts": left_padded(RAGGED)}] * count)


@pytest.fixture
def make_ppo(make_lm, make_scorer):
    def make(**options) -> PPOModule:
        usual = {
            "generation": SamplingParams(max_new_tokens=3),
            "updates": UpdateSchedule(minibatch=2),
            "schedule": ConstantSchedule(),
        }
        adam = partial(torch.optim.Adam, lr=0.01)
        return PPOModule(
            make_lm().double(), ModuleReward(make_scorer().double()), **gathered(optimizer=adam, **usual | options)
        )

    return make


@pytest.fixture
def fit(make_ppo, make_trainer, batches, tmp_path):
    """A run of some rollouts with a `RunCheckpoint`; the module."""

    def run(count: int, *, callbacks=(), ckpt_path=None, trainer_options=None, **options) -> PPOModule:
        saver = RunCheckpoint(str(tmp_path / "kept"), **options)
        trainer = make_trainer(callbacks=[*callbacks, saver], enable_checkpointing=True, **trainer_options or {})
        module = make_ppo()
        trainer.fit(module, batches(count), ckpt_path=ckpt_path)
        return module

    return run


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "kept"


def iteration(path: Path) -> int:
    return torch.load(path, weights_only=True)["rlhf"]["iteration"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("every", "last", "before"), [(1, 5, 4), (2, 5, 4), (3, 5, 3)])
def test_every_so_many_rollouts_and_the_end_are_saved(fit, kept, every, last, before):
    fit(5, every_n_batches=every)
    assert names(kept) == ["last-previous.ckpt", "last.ckpt"]
    assert (iteration(kept / "last.ckpt"), iteration(kept / "last-previous.ckpt")) == (last, before)


def test_end_is_saved_once(fit, kept):
    fit(4, every_n_batches=10)
    assert names(kept) == ["last.ckpt"]
    assert iteration(kept / "last.ckpt") == 4


def test_dry_run_saves_nothing(fit, kept):
    fit(2, trainer_options={"fast_dev_run": True})
    assert not kept.exists() or names(kept) == []


def test_best_of_a_metric_are_kept_beside_the_last(make_ppo, make_trainer, batches, as_loader, left_padded, kept):
    class Curve(Callback):
        values = iter([1.0, 3.0, 2.0, 0.0])

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("eval/curve", next(self.values))

    saver = RunCheckpoint(str(kept), every_n_batches=100, monitor="eval/curve", save_top_k=2)
    trainer = make_trainer(callbacks=[Curve(), saver], enable_checkpointing=True, max_epochs=4)
    trainer.fit(make_ppo(), batches(1), as_loader([left_padded(RAGGED)]))
    best = [name for name in names(kept) if name.startswith("best")]
    assert sorted(iteration(kept / name) for name in best) == [2, 3]
    assert iteration(kept / "last.ckpt") == 4


def test_checkpoint_loads_safely_and_holds_no_frozen_network(fit, kept):
    module = fit(1)
    found = torch.load(kept / "last.ckpt", weights_only=True)
    trained = {f"policy.{name}" for name, _ in module.policy.named_parameters()}
    assert trained <= found["state_dict"].keys()
    assert all(name.startswith("policy.network.") for name in found["state_dict"])
    size = sum(p.numel() * p.element_size() for p in set(module.policy.parameters()))
    assert (kept / "last.ckpt").stat().st_size < 5 * size  # weights (the tied head twice), two moments: no reference


def test_resumed_from_the_end_is_the_longer_run(make_ppo, make_trainer, batches, kept):
    def run(folder, epochs, ckpt_path=None):
        module = make_ppo()
        saver = RunCheckpoint(str(folder), every_n_batches=100)
        trainer = make_trainer(callbacks=[saver], enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(module, batches(2), ckpt_path=ckpt_path)
        return module

    whole = run(kept.with_name("other"), 2)
    run(kept, 1)
    resumed = run(kept, 2, "last")
    assert resumed.iteration == whole.iteration == 4
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("harm", [tear, lambda path: path.write_bytes(b""), lambda path: path.write_text("nonsense")])
def test_torn_checkpoint_gives_way_to_the_one_before(fit, kept, caplog, harm):
    fit(3)
    harm(kept / "last.ckpt")
    seen = []
    note = {i: partial(seen.append, i) for i in range(9)}
    fit(3, callbacks=[Act(note)], ckpt_path="last")
    assert seen == [2]
    assert "last.ckpt is torn" in caplog.text
    assert "going on from the one before it" in caplog.text


def test_flipped_bit_is_found(fit, kept):
    fit(1)
    assert defect(kept / "last.ckpt") is None
    content = bytearray((kept / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (kept / "last.ckpt").write_bytes(content)
    assert "checksum" in defect(kept / "last.ckpt")


def test_nothing_whole_is_said_and_not_begun_anew(fit, kept):
    fit(2)
    for name in names(kept):
        tear(kept / name)
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        fit(2, ckpt_path="last")


def test_torn_checkpoint_that_was_named_is_refused(fit, kept):
    fit(1)
    tear(kept / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is torn: .*take another one, or --ckpt_path last"):
        fit(2, ckpt_path=str(kept / "last.ckpt"))


def test_folder_of_shards_is_refused_where_a_file_is_read(fit, kept):
    (kept / "sharded.ckpt").mkdir(parents=True)
    (kept / "sharded.ckpt" / "latest").write_text("step")
    with pytest.raises(ValueError, match="sharded.ckpt is a folder, as strategies that shard a model write: set the"):
        fit(2, ckpt_path=str(kept / "sharded.ckpt"))


def test_last_without_any_begins(fit):
    assert fit(2, ckpt_path="last").iteration == 2


def test_new_run_moves_the_checkpoints_of_an_old_one_aside(fit, kept, caplog):
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.glob("*.ckpt")}

    fit(2)
    first = content(kept)
    (kept / "best-step=1.ckpt").mkdir()  # as FSDP2 writes
    assert "earlier run" not in caplog.text
    fit(1)
    second = content(kept)
    assert f"earlier run, which are now in {kept / 'earlier-1'}" in caplog.text
    assert names(kept) == ["earlier-1", "last.ckpt"]
    assert names(kept / "earlier-1") == ["best-step=1.ckpt", "last-previous.ckpt", "last.ckpt"]
    (kept / "earlier-1" / "best-step=1.ckpt").rmdir()
    assert content(kept / "earlier-1") == first
    fit(2, ckpt_path=str(kept / "earlier-1" / "last.ckpt"))  # of another folder
    assert (content(kept / "earlier-1"), content(kept / "earlier-2")) == (first, second)
    assert iteration(kept / "last.ckpt") == 2
    fit(2, ckpt_path="last")
    assert names(kept) == ["earlier-1", "earlier-2", "last.ckpt"]


def test_full_disk_leaves_the_checkpoints_before_and_the_run(fit, kept, monkeypatch, caplog):
    save = checked_io.write

    def full(checkpoint, path):
        if checkpoint["rlhf"]["iteration"] in (3, 4):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(checkpoint, path)

    monkeypatch.setattr(checked_io, "write", full)
    module = fit(4)
    assert module.iteration == 4
    assert names(kept) == ["last-previous.ckpt", "last.ckpt"]
    assert (iteration(kept / "last.ckpt"), iteration(kept / "last-previous.ckpt")) == (2, 1)
    assert "No space left on device" in caplog.text


@contextmanager
def files_of_at_most(size):
    """The operating system's own refusal to write more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("new_column", [False, True], ids=["appended to", "written anew"])
def test_full_disk_costs_no_line_of_a_csv_log(fit, tmp_path, caplog, new_column):
    """Rollouts 2 and 3 find no room: the file stays as it was, and rollout 4 writes their rows."""
    log, seen = CSVLogger(tmp_path, name="log", version=""), []
    path = tmp_path / "log" / "metrics.csv"

    class Fill(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if pl_module.iteration:
                seen.append(path.read_bytes())
            room = len(seen[0]) + 40 if pl_module.iteration in (1, 2) else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

        def on_train_batch_end(self, trainer, pl_module, *_):
            if new_column and pl_module.iteration == 2:
                pl_module.log("new", 1.0)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"logger": log, "log_every_n_steps": 1}
    with files_of_at_most(before[0]):
        fit(4, callbacks=[Fill()], trainer_options=options, every_n_batches=100)
    assert seen[0] == seen[1] == seen[2]
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 4
    assert all(row["loss/policy_avg"] for row in rows)
    assert names(path.parent) == ["hparams.yaml", "metrics.csv"]
    said = [record.getMessage() for record in caplog.records if "could not write" in record.getMessage()]
    assert len(said) == 1
    assert "CSVLogger" in said[0]
    assert "File too large" in said[0]


def test_any_logger_that_cannot_write_costs_no_run(fit, tmp_path, monkeypatch, caplog):
    log = TensorBoardLogger(tmp_path, name="log")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    fill = Act({1: lambda: monkeypatch.setattr(log.experiment, "add_scalar", full)})
    assert fit(3, callbacks=[fill], trainer_options={"logger": log, "log_every_n_steps": 1}).iteration == 3
    assert caplog.text.count("TensorBoardLogger could not write") == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        CheckpointException("write", {1: (OSError(28, "inline_container"), traceback.StackSummary())}),
    ],
)
def test_full_disk_as_sharded_writers_say_it_costs_no_run(fit, kept, monkeypatch, caplog, error):
    def full(*_):
        raise error

    monkeypatch.setattr(checked_io, "write", full)
    assert fit(2).iteration == 2
    assert names(kept) == []
    said = [record.getMessage() for record in caplog.records if "was not written" in record.getMessage()]
    assert len(said) == 3
    assert all(("inline_container" in line or "PytorchStreamWriter" in line) and "\n" not in line for line in said)


def test_other_error_in_a_checkpoint_ends_the_run(fit, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(checked_io, "write", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        fit(2)


def test_write_that_the_system_ends_leaves_no_trace(fit, kept, tmp_path, monkeypatch, caplog):
    """Half of the file is written before it fails: nothing of it is left, here or where temporary files are made."""
    save, scratch = checked_io.write, tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def cut(checkpoint, path):
        count = checkpoint["rlhf"]["iteration"]
        size = (kept / "last.ckpt").stat().st_size if count > 1 else 0
        with files_of_at_most(size // 2) if count in (3, 4) else nullcontext():
            save(checkpoint, path)

    monkeypatch.setattr(checked_io, "write", cut)
    assert fit(4).iteration == 4
    assert names(kept) == ["last-previous.ckpt", "last.ckpt"]
    assert [defect(kept / name) for name in names(kept)] == [None, None]
    assert (iteration(kept / "last.ckpt"), iteration(kept / "last-previous.ckpt")) == (2, 1)
    assert names(scratch) == []
    said = [record.getMessage() for record in caplog.records if "was not written" in record.getMessage()]
    assert len(said) == 3  # the end tries once more
    assert all("File too large" in line and "\n" not in line for line in said)


def test_disk_that_fails_at_the_rename_leaves_a_checkpoint(fit, kept, monkeypatch):
    rename = room.rename

    def fails(path, name):
        if path.name.endswith(".part") and (kept / "last-previous.ckpt").exists():
            raise OSError(5, "Input/output error")
        rename(path, name)

    monkeypatch.setattr(room, "rename", fails)
    fit(3)
    assert [iteration(kept / name) for name in names(kept)] == [1]


@pytest.mark.parametrize(
    ("number", "error", "status"), [(signal.SIGINT, SystemExit, 1), (signal.SIGTERM, SIGTERMException, 143)]
)
def test_signal_saves_the_rollout_and_leaves(fit, kept, number, error, status, caplog):
    before = signal.getsignal(number)
    with pytest.raises(error) as left:
        fit(5, every_n_batches=10, callbacks=[Act({1: lambda: signal.raise_signal(number)})])
    assert left.value.code == status
    assert iteration(kept / "last.ckpt") == 2  # the rollout in which it came was finished
    assert "is finished and saved" in caplog.text
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones while it leaves
    assert number == signal.SIGINT or signal.getsignal(number) == before
    assert fit(5, ckpt_path="last").iteration == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_leaves_at_once(fit, kept, number):
    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    with pytest.raises(SystemExit):
        fit(5, callbacks=[Act({2: twice})])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert iteration(kept / "last.ckpt") == 2  # what was whole before


def test_handlers_are_given_back(fit):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_error_saves_nothing_half_done(fit, kept):
    def fails():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(5, every_n_batches=2, callbacks=[Act({3: fails})])
    assert iteration(kept / "last.ckpt") == 2


@pytest.mark.parametrize("name", ["every_n_batches", "save_top_k"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=name):
        RunCheckpoint("x", **{name: 0})


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.WARNING)
