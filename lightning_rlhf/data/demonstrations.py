"""Data module of demonstrations for supervised fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.collate import collate_texts
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.datamodule import TextDataModule, at_least
from lightning_rlhf.data.examples import demonstration_examples
from lightning_rlhf.data.loader import ResumableLoader
from lightning_rlhf.data.sources import Source


class DemonstrationDataModule(TextDataModule):
    """Batches of demonstrations (`TextBatch`) with targets on the response and its end token.

    Rows are `{"prompt", "response"}`, dialogues under `"messages"`, or documents under `"text"`, which are predicted
    whole, from paths, the hub or objects, as in `PromptDataModule`. Evaluation serves a list of one loader.

    Args:
        train: demonstrations to train on.
        val: demonstrations to validate on.
        test: demonstrations to test on.
        loss_on_prompt: predict the prompt as well, not the response alone.
        batch_size: demonstrations per process and batch.
        eval_batch_size: demonstrations per process and evaluation batch; None for `batch_size`.
        max_tokens: longest prompt + response + end token, tokens; longer ones are dropped and counted.
        prompt_role: role under which a text prompt becomes a message for the chat template; None leaves it plain text.
        chat_template_kwargs: arguments of the chat template for every dialogue, such as `{"enable_thinking": false}`; a
            row's own come first.
        columns: names of the keys in the files.
        tokenizer: a tokenizer, its folder or hub name; None for that of the module being trained.
        num_workers: processes that assemble batches; 0 for none.
        seed: seed of the order of the demonstrations; None is that of `seed_everything`, else 0.

    Raises:
        ValueError: a size is too small.
    """

    def __init__(
        self,
        train: Source,
        val: Source = None,
        test: Source = None,
        loss_on_prompt: bool = False,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        max_tokens: int = 1024,
        prompt_role: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        columns: ColumnNames = ColumnNames(),
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            prompt_role=prompt_role,
            chat_template_kwargs=chat_template_kwargs,
            columns=columns,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.train = train
        self.val = val
        self.test = test
        self.loss_on_prompt = loss_on_prompt
        self.max_tokens = at_least(2, max_tokens=max_tokens)

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
