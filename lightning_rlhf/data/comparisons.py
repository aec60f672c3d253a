"""Data module of ranked responses for the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_rlhf.data.collate import collate_comparisons, collate_texts
from lightning_rlhf.data.datamodule import TextDataModule, check_least
from lightning_rlhf.data.examples import comparison_examples, demonstration_examples
from lightning_rlhf.data.loader import ResumableLoader
from lightning_rlhf.data.sources import Source


@dataclass(eq=False, repr=False)
class ComparisonDataModule(TextDataModule):
    """Batches of prompts (`ComparisonBatch`), each with all of its K ranked responses.

    Rows are `{"prompt", "chosen", "rejected"}` (the prompt may be implicit), `{"prompt", "responses", "scores" |
    "ranks"}` or NeMo-RL's `{"context", "completions"}`, from paths, the hub or objects, as in `PromptDataModule`.
    Scores, or the `"margin"` a pair may have, are also the labeler's ratings, for a loss with a margin. Beside K
    responses `"systems"` may name who wrote each, by which an evaluation then gives the accuracy.
    Evaluation serves a list of loaders: comparisons, then `TextBatch`es where `demonstrations` is given.

    Arguments from `batch_size` to `seed` are those of `TextDataModule`, by name.

    Args:
        train: comparisons to train on.
        val: comparisons to validate on.
        test: comparisons to test on.
        demonstrations: answers, `{"prompt", "response"}`, whose mean score is to be 0 (Ouyang et al. 2022, §3.5).
        max_tokens: longest prompt + response + end token, tokens; longer ones are dropped and counted.

    Raises:
        ValueError: a size is too small.
    """

    train: Source = None
    val: Source = None
    test: Source = None
    demonstrations: Source = None
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
            self.load(name, comparison_examples, limit="max_tokens", required=name == needed[0])
        if needed:
            self.load("demonstrations", demonstration_examples, limit="max_tokens")

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of training comparisons."""
        return self.training_loader(self.training_stream("train", collate_comparisons, batch_size=self.batch_size))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loaders of comparisons and demonstrations; empty without `val`."""
        return [] if self.val is None else self._evaluation("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loaders of test comparisons and demonstrations."""
        return self._evaluation("test")

    def demonstration_dataloader(self) -> DataLoader[Any]:
        """Build a loader of the demonstrations, each once over all processes.

        Raises:
            ValueError: `demonstrations` was not given.
        """
        return self.evaluation_loader("demonstrations", collate_texts)

    def _evaluation(self, name: str) -> list[DataLoader[Any]]:
        demonstrations = [] if self.demonstrations is None else [self.demonstration_dataloader()]
        return [self.evaluation_loader(name, collate_comparisons), *demonstrations]
