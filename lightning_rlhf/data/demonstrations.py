"""Data module of demonstrations for supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from lightning_rlhf.data.collate import collate_texts
from lightning_rlhf.data.datamodule import TextDataModule, check_least
from lightning_rlhf.data.examples import demonstration_examples
from lightning_rlhf.data.loader import ResumableLoader
from lightning_rlhf.data.sources import Source


@dataclass(eq=False, repr=False)
class DemonstrationDataModule(TextDataModule):
    """Batches of demonstrations (`TextBatch`) with targets on the response and its end token.

    Rows are `{"prompt", "response"}`, dialogues under `"messages"`, or documents under `"text"`, which are predicted
    whole, from paths, the hub or objects, as in `PromptDataModule`. Evaluation serves a list of one loader.

    Arguments from `batch_size` to `seed` are those of `TextDataModule`, by name.

    Args:
        train: demonstrations to train on.
        val: demonstrations to validate on.
        test: demonstrations to test on.
        loss_on_prompt: predict the prompt as well, not the response alone.
        max_tokens: longest prompt + response + end token, tokens; longer ones are dropped and counted.

    Raises:
        ValueError: a size is too small.
    """

    train: Source = None
    val: Source = None
    test: Source = None
    loss_on_prompt: bool = False
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
        read = partial(demonstration_examples, loss_on_prompt=self.loss_on_prompt)
        for name in needed:
            self.load(name, read, limit="max_tokens", required=name == needed[0])

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of training demonstrations."""
        return self.training_loader(self.training_stream("train", collate_texts, batch_size=self.batch_size))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loader of validation demonstrations; empty without `val`."""
        return [] if self.val is None else [self.evaluation_loader("val", collate_texts)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loader of test demonstrations."""
        return [self.evaluation_loader("test", collate_texts)]
