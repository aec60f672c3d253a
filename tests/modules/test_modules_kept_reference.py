"""PreferenceModule(cache_reference=True): one pass of the reference per text, on disk, to the bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_rlhf.callbacks import MovingReference
from lightning_rlhf.core import DPO, KTO, ConstantSchedule
from lightning_rlhf.data import ComparisonDataModule
from lightning_rlhf.models import ModelSource
from lightning_rlhf.models.kept_logprobs import KeptLogprobs, alone, key_of
from lightning_rlhf.modules import PreferenceModule
from lightning_rlhf.types import LabeledBatch, TextBatch

ROWS = [
    {"prompt": "a b", "responses": ["v", "w x"], "ranks": [0, 1]},
    {"prompt": "c", "responses": ["z z z", "y", "v"], "ranks": [1, 0, 2]},
    {"prompt": "d e f g h", "responses": ["w", "x y z"], "ranks": [0, 1]},
    {"prompt": "i", "responses": ["w", "x"], "ranks": [0, 1]},
]
TOKENS, REAL = torch.tensor([[12, 20, 0]]), torch.ones(1, 3, dtype=torch.bool)
LABELED = LabeledBatch(TOKENS, REAL, REAL & (torch.arange(3) > 0), torch.tensor([True]))
ADAM = partial(torch.optim.Adam, lr=0.01)


class Passes(Callback):
    """Forward passes of the reference in every epoch, and what every step logged."""

    def __init__(self) -> None:
        self.counts, self.losses = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        if not self.counts:
            pl_module.reference.frozen.register_forward_pre_hook(self._count)
        self.counts.append(0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def _count(self, *_):
        self.counts[-1] += 1


@pytest.fixture
def fit(make_folder, make_trainer, write_rows, tmp_path):
    """Epochs in a folder of their own; passes and losses, and the weights."""
    rows, policy, models = write_rows("comparisons.jsonl", ROWS), make_folder(), {}

    def model(seed):
        return models.setdefault(seed, make_folder(seed=seed))

    def run(
        epochs=2,
        *,
        root="run",
        batch_size=2,
        seed=5,
        loss=DPO(beta=0.3),
        cache=True,
        path=None,
        callbacks=(),
        **options,
    ):
        reference = ModelSource(path=model(seed), dtype="float64")
        source = ModelSource(path=policy, dtype="float64")
        usual = {"optimizer": ADAM, "schedule": ConstantSchedule(), "cache_reference": cache}
        module, passes = PreferenceModule(source, loss, reference, **usual), Passes()
        data = ComparisonDataModule(train=rows, batch_size=batch_size)
        ckpt = options.pop("ckpt_path", None)
        trainer = make_trainer(
            callbacks=[passes, *callbacks], max_epochs=epochs, default_root_dir=tmp_path / root, **options
        )
        trainer.fit(module, data, ckpt_path=ckpt)
        if path is not None:
            trainer.save_checkpoint(path)
        passes.weights = [p.detach().clone() for p in module.model.parameters()]
        return passes

    return run


def kept(root: Path) -> list[Path]:
    return sorted(root.glob("reference-logprobs/*/*/logprobs.safetensors"))


def same(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_second_epoch_asks_the_reference_nothing(fit, tmp_path):
    """Nine responses, of which the first epoch asks each once; without a cache every batch asks."""
    cached, plain = fit(3), fit(3, cache=False, root="plain")
    assert cached.counts == [9, 0, 0]
    assert plain.counts == [2, 2, 2]
    assert cached.losses == pytest.approx(plain.losses, abs=1e-9)
    assert len(kept(tmp_path / "run")) == 1
    assert not (tmp_path / "plain" / "reference-logprobs").exists()


def test_later_run_reads_what_an_earlier_one_wrote_to_the_bit(fit):
    first, second = fit(), fit()
    assert (first.counts, second.counts) == ([9, 0], [0, 0])
    assert first.losses == second.losses
    assert same(first.weights, second.weights)


def test_resumed_run_reads_the_cache_and_ends_as_a_whole_one(fit, tmp_path):
    whole = fit(3, root="whole")
    fit(1, path=tmp_path / "x.ckpt")
    rest = fit(3, ckpt_path=tmp_path / "x.ckpt")
    assert rest.counts == [0, 0]
    assert rest.losses == whole.losses[2:]
    assert same(rest.weights, whole.weights)


def test_row_is_the_same_to_the_bit_in_whatever_batch(fit, make_lm, tmp_path):
    """Of one row or of four, where padding differs."""
    fit(1, batch_size=1, root="one")
    fit(1, batch_size=4, root="four")
    read = [KeptLogprobs(), KeptLogprobs()]
    for cache, root in zip(read, ("one", "four"), strict=True):
        (folder,) = (tmp_path / root / "reference-logprobs").iterdir()
        cache.read(folder)
    assert read[0]._known == read[1]._known
    assert len(read[0]._known) == 9


def test_another_reference_reads_nothing(fit, tmp_path):
    """Nor does one precision read another's."""
    fit(1)
    assert fit(1, seed=6).counts == [9]
    assert fit(1, precision="bf16-mixed").counts == [9]
    assert fit(1).counts == [0]
    assert len(list((tmp_path / "run" / "reference-logprobs").iterdir())) == 3


def test_module_that_is_trained_twice_begins_anew(make_lm, make_trainer, write_rows, tmp_path):
    """In another precision and folder nothing that the first trainer computed is left."""
    module = PreferenceModule(make_lm(), KTO(), optimizer=ADAM, schedule=ConstantSchedule(), cache_reference=True)
    module.configure_model()
    module.rewards(LABELED)
    assert len(module._kept._known) == 1
    passes = [Passes(), Passes()]
    for each, precision in zip(passes, ("32-true", "bf16-mixed"), strict=True):
        trainer = make_trainer(
            callbacks=[each], max_epochs=1, precision=precision, default_root_dir=tmp_path / precision
        )
        trainer.fit(module, DataLoader([LABELED], batch_size=None))
    assert [each.counts for each in passes] == [[4], [2]]  # the first also counts the two of the second


def test_mismatched_pairs_of_kto_are_not_kept(fit):
    """They are new in every epoch: one pass a batch remains."""
    assert fit(2, loss=KTO(beta=0.3)).counts == [9 + 2, 2]


def test_dry_run_writes_nothing(fit, tmp_path):
    fit(1, fast_dev_run=True)
    assert not kept(tmp_path / "run")


def test_killed_run_keeps_what_its_checkpoint_had_seen(fit, tmp_path):
    class Leave(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            assert len(kept(tmp_path / "run")) == 1
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(1, callbacks=[Leave()])


def test_processes_read_what_others_wrote(tmp_path):
    one, two = KeptLogprobs(), KeptLogprobs()
    one.add(b"a" * 32, -1.5)
    two.add(b"b" * 32, -2.5)
    for cache in (one, two):
        cache.write(tmp_path / "x")
    for cache in (one, two):
        cache.read(tmp_path / "x")
        assert (cache[b"a" * 32], cache[b"b" * 32]) == (-1.5, -2.5)
    one.write(tmp_path / "x")
    assert len(list((tmp_path / "x").iterdir())) == 2


def test_key_is_of_tokens_and_targets_and_not_of_padding():
    tokens = torch.tensor([[1, 2, 3, 9], [1, 2, 3, 8], [1, 2, 4, 9], [1, 2, 3, 9]])
    mask = torch.tensor([[True, True, True, False]] * 4)
    target = torch.tensor([[False, True, True, False]] * 3 + [[False, False, True, False]])
    keys = [key_of(alone(TextBatch(tokens, mask, target), row)) for row in range(4)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_moving_reference_is_refused(fit, tmp_path):
    with pytest.raises(ValueError, match="stale once MovingReference moves it"):
        fit(1, callbacks=[MovingReference()])
    fit(1, cache=False, callbacks=[MovingReference(every=1)], path=tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="the checkpoint's reference has moved"):
        fit(2, ckpt_path=tmp_path / "x.ckpt")


def test_damaged_file_is_named(tmp_path):
    cache = KeptLogprobs()
    cache.add(b"a" * 32, -1.5)
    cache.write(tmp_path / "x")
    (file,) = tmp_path.glob("x/*/logprobs.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"logprobs.safetensors is damaged .* delete its folder"):
        KeptLogprobs().read(tmp_path / "x")
