from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlhf.data import ComparisonDataModule, DemonstrationDataModule, PromptDataModule

Write = Callable[..., str]
SIZE, BATCH = 7, 2  # 4 batches an epoch, the last runs on into the next


class Recorder(LightningModule):
    """Writes down what it is given; trains a weight that does not matter."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []
        self.evaluated: list[tuple[int, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first = batch["prompts"] if isinstance(batch, dict) else batch
        text = batch["pretrain"].tokens.tolist() if isinstance(batch, dict) and "pretrain" in batch else None
        self.seen.append((first.tokens.tolist(), text))
        return self.weight * 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch.rows

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def prompts(write: Write) -> str:
    return write("prompts.jsonl", [{"prompt": letter} for letter in "abcdefghij"[:SIZE]])


@pytest.fixture
def texts(write: Write) -> str:
    return write("texts.jsonl", [{"text": " ".join("abklmnopqrstuvwxyz")}])


def trainer(tmp_path: Path, **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = {"enable_checkpointing": "callbacks" in arguments}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **saves, **arguments)


def ptx(prompts: Any, texts: str, plain: Any, **arguments: Any) -> PromptDataModule:
    return PromptDataModule(
        prompts, pretrain=texts, batch_size=BATCH, pretrain_ratio=1.5, text_tokens=4, tokenizer=plain, **arguments
    )


def fit(tmp_path: Path, data: Any, ckpt_path: Any = None, **arguments: Any) -> Recorder:
    module = Recorder()
    trainer(tmp_path, **arguments).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize(("num_workers", "stops"), [(0, range(1, 9)), (2, [3])])
def test_interrupted_run_sees_what_an_uninterrupted_one_does(
    tmp_path: Path, prompts: str, texts: str, plain: Any, num_workers: int, stops: Any, validated: bool
) -> None:
    """Workers too, and from the last batch of an epoch, with and without validation after it."""
    val = prompts if validated else None

    def data() -> PromptDataModule:
        return ptx(prompts, texts, plain, num_workers=num_workers, val=val)

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, data(), max_epochs=3, callbacks=[saves], num_sanity_val_steps=0).seen
    assert len(whole) == 12
    assert len({str(batch) for batch in whole}) == 12
    for stop in stops:
        resumed = fit(tmp_path, data(), ckpt_path=tmp_path / f"step={stop}.ckpt", max_epochs=3, num_sanity_val_steps=0)
        assert resumed.seen == whole[stop:], f"stopped after {stop}"


def test_run_resumed_from_the_end_of_an_epoch(tmp_path: Path, prompts: str, texts: str, plain: Any) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True, every_n_epochs=1)
    whole = fit(tmp_path, ptx(prompts, texts, plain), max_epochs=3, callbacks=[saves]).seen
    for epoch in (0, 1):
        checkpoint = tmp_path / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path, ptx(prompts, texts, plain), ckpt_path=checkpoint, max_epochs=3)
        assert resumed.seen == whole[4 * (epoch + 1) :]


def test_table_resumes_from_workers_and_another_is_refused(tmp_path: Path, texts: str, plain: Any) -> None:
    table = pytest.importorskip("datasets").Dataset.from_list([{"prompt": letter} for letter in "abcdefghij"[:SIZE]])
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(tmp_path, ptx(table, texts, plain), max_epochs=2, callbacks=[saves]).seen
    again = {"ckpt_path": tmp_path / "step=3.ckpt", "max_epochs": 2}
    assert fit(tmp_path, ptx(table, texts, plain, num_workers=2), **again).seen == whole[3:]
    with pytest.raises(ValueError, match=rf"rows.train: {SIZE} before, {SIZE - 1} now"):
        fit(tmp_path, ptx(table.select(range(SIZE - 1)), texts, plain), **again)


def test_resuming_with_short_epochs(tmp_path: Path, prompts: str, texts: str, plain: Any) -> None:
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    limits = {"max_epochs": 3, "limit_train_batches": 3}
    whole = fit(tmp_path, ptx(prompts, texts, plain), callbacks=[saves], **limits).seen
    assert len(whole) == 9
    for stop in (2, 3, 4, 6):
        checkpoint = tmp_path / f"step={stop}.ckpt"
        assert fit(tmp_path, ptx(prompts, texts, plain), ckpt_path=checkpoint, **limits).seen == whole[stop:]


def test_fit_serves_every_prompt_once_a_pass_and_validates_all_loaders(
    tmp_path: Path, prompts: str, texts: str, plain: Any
) -> None:
    data = PromptDataModule(
        prompts, val=prompts, val_pretrain=texts, batch_size=BATCH, eval_batch_size=4, text_tokens=4
    )
    module = Recorder(tokenizer=plain)  # the data takes the module's
    trainer(tmp_path, max_epochs=7, num_sanity_val_steps=0, check_val_every_n_epoch=7).fit(module, data)
    rows = [row[0] for tokens, _ in module.seen for row in tokens]
    assert len(rows) == 7 * 4 * BATCH
    for number in range(len(rows) // SIZE):
        assert sorted(rows[SIZE * number : SIZE * (number + 1)]) == list(range(10, 10 + SIZE))
    assert [(index, batch.tokens.shape[0]) for index, batch in module.evaluated] == [
        (0, 4),
        (0, 3),
        (1, 4),
        (1, 1),
    ]  # 19 tokens


def test_fit_without_validation(tmp_path: Path, prompts: str, plain: Any) -> None:
    module = Recorder()
    loud = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    loud.fit(module, PromptDataModule(prompts, batch_size=BATCH, tokenizer=plain))
    assert len(module.seen) == 4
    assert not module.evaluated


def test_validate_test_and_predict(tmp_path: Path, prompts: str, texts: str, plain: Any) -> None:
    data = PromptDataModule(val=prompts, test=prompts, val_pretrain=texts, batch_size=4, text_tokens=4, tokenizer=plain)
    for run in ("validate", "test"):
        module = Recorder()
        getattr(trainer(tmp_path), run)(module, data, verbose=False)
        assert [index for index, _ in module.evaluated] == [0, 0, 1, 1]
    batches = trainer(tmp_path).predict(Recorder(), data)
    assert [row["prompt"] for rows in batches for row in rows] == list("abcdefg")
    with pytest.raises(ValueError, match="needs `val` for this"):
        trainer(tmp_path).validate(Recorder(), PromptDataModule(prompts, tokenizer=plain))


def test_comparisons_and_demonstrations_train(tmp_path: Path, write: Write, plain: Any) -> None:
    rows = [{"prompt": letter, "response": "a", "chosen": "a", "rejected": "b"} for letter in "abcde"]
    path = write("rows.jsonl", rows)
    comparisons = ComparisonDataModule(path, val=path, demonstrations=path, batch_size=2, tokenizer=plain)
    module = fit(tmp_path, comparisons, max_epochs=1, num_sanity_val_steps=0)
    assert [len(tokens) for tokens, _ in module.seen] == [2, 2, 2]
    assert [index for index, _ in module.evaluated] == [0, 0, 0, 1, 1, 1]
    demonstrations = DemonstrationDataModule(path, val=path, batch_size=2, tokenizer=plain)
    module = fit(tmp_path, demonstrations, max_epochs=1, num_sanity_val_steps=0)
    assert [len(tokens) for tokens, _ in module.seen] == [2, 2, 2]
    assert [index for index, _ in module.evaluated] == [0, 0, 0]


def test_overfitting_repeats_the_first_batches(tmp_path: Path, prompts: str, texts: str, plain: Any) -> None:
    data = ptx(prompts, texts, plain, val=prompts)
    seen = fit(tmp_path, data, max_epochs=3, overfit_batches=2, num_sanity_val_steps=0).seen
    assert len(seen) == 6
    assert seen[:2] == seen[2:4] == seen[4:]
    assert all(len(tokens) == BATCH for tokens, _ in seen)


def test_batches_move_and_cast(tmp_path: Path, prompts: str, texts: str, plain: Any) -> None:
    module = fit(tmp_path, ptx(prompts, texts, plain), max_epochs=1, precision="bf16-true")
    assert all(isinstance(token, int) for tokens, _ in module.seen for row in tokens for token in row)
