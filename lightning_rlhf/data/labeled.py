"""Data module of responses with a good or bad label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_rlhf.data.collate import collate_labeled
from lightning_rlhf.data.datamodule import TextDataModule, check_least
from lightning_rlhf.data.examples import labeled_examples
from lightning_rlhf.data.loader import ResumableLoader
from lightning_rlhf.data.sources import Source


@dataclass(eq=False, repr=False)
class LabeledDataModule(TextDataModule):
    """Batches of responses with a label (`LabeledBatch`), one to each prompt.

    `KTO` learns from them. Rows are `{"prompt", "response", "label"}`, or TRL's with `"completion"`; the label is true
    for a good response and false for a bad one. They come from paths, the hub or objects, as in `PromptDataModule`.

    Arguments from `batch_size` to `seed` are those of `TextDataModule`, by name.

    Args:
        train: responses to train on.
        val: responses to validate on.
        test: responses to test on.
        max_tokens: longest prompt + response + end token, tokens; longer ones are dropped and counted.

    Raises:
        ValueError: a size is too small.
    """

    train: Source = None
    val: Source = None
    test: Source = None
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(2, max_tokens=self.max_tokens)

    def setup(self, stage: str) -> None:
        """Read the rows of a stage (`fit`, `validate` or `test`).

        Raises:
            ValueError: its files were not named or cannot be read.
        """
        needed = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(stage, [])
        for name in needed:
            self.load(name, labeled_examples, limit="max_tokens", required=name == needed[0])

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of training responses."""
        return self.training_loader(self.training_stream("train", collate_labeled, batch_size=self.batch_size))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loader of validation responses; empty without `val`."""
        return [] if self.val is None else [self.evaluation_loader("val", collate_labeled)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loader of test responses."""
        return [self.evaluation_loader("test", collate_labeled)]
