"""Data module of prompts, with an endless stream of pretraining text beside them (PPO-ptx)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.data.collate import collate_prompts, collate_texts
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.datamodule import Collate, TextDataModule, check_least
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import TextExample, pretraining_blocks, prompt_examples
from lightning_rlhf.data.loader import JointStream, ResumableLoader, Stream
from lightning_rlhf.data.records import Located
from lightning_rlhf.data.sampling_order import NextOrder
from lightning_rlhf.data.sources import Source
from lightning_rlhf.text import Encoder
from lightning_rlhf.types import PromptBatch


@dataclass(eq=False, repr=False)
class PromptDataModule(TextDataModule):
    """Batches `{"prompts": PromptBatch}` for PPO, with `"pretrain": TextBatch` if `pretrain` is set.

    Prompts are rows with `{"prompt"}`, other keys kept for the reward; pretraining rows have `{"text"}`. Each may come
    from paths (JSONL, Parquet, CSV, patterns, saved datasets), from the hub (OWNER/NAME:SPLIT, `HubData`) or, in
    Python, be a `datasets.Dataset` or a list. Evaluation serves bare batches from a list of loaders: prompts, then
    texts where `val_pretrain` is given.

    Arguments from `batch_size` to `seed` are those of `TextDataModule`, by name.

    Args:
        train: prompts to train on.
        val: prompts to validate on.
        val_sets: further prompts to validate on, by the name under which `eval@NAME/…` is logged.
        test: prompts to test on.
        predict: prompts to respond to in `predict`; None for `test`, or else `val`.
        pretrain: pretraining documents to mix into training.
        val_pretrain: pretraining documents to validate and test on.
        pretrain_ratio: pretraining texts per episode, where an episode is one response (Ouyang et al. 2022, C.4).
        max_prompt_tokens: longer prompts are dropped and counted, tokens.
        text_tokens: length of a pretraining text, tokens.

    Raises:
        ValueError: a size is too small.
    """

    train: Source = None
    val: Source = None
    test: Source = None
    predict: Source = None
    pretrain: Source = None
    val_pretrain: Source = None
    val_sets: dict[str, Source] | None = None
    pretrain_ratio: float = 8.0
    max_prompt_tokens: int = 1024
    text_tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(pretrain_ratio=self.pretrain_ratio)
        wrong = [name for name in self.val_sets or {} if not re.fullmatch(r"[\w.-]+", name)]
        if wrong:
            raise ValueError(f"`val_sets` must have names of letters, digits, '_', '.' and '-': got {wrong}")
        check_least(1, max_prompt_tokens=self.max_prompt_tokens)
        check_least(2, text_tokens=self.text_tokens)
        self._further: Stream | None = None

    def setup(self, stage: str) -> None:
        """Read the rows of a stage (`fit`, `validate`, `test` or `predict`).

        Raises:
            ValueError: its files were not named or cannot be read.
        """
        if stage == "fit":
            self._load_prompts("train", required=True)
            self._load_texts("pretrain")
        if stage in ("fit", "validate"):
            alone = self.val_pretrain is None and not self.val_sets
            self._load_prompts("val", required=stage == "validate" and alone)
            for name, source in (self.val_sets or {}).items():
                self.load(f"val_sets.{name}", prompt_examples, limit="max_prompt_tokens", source=source)
        if stage == "test":
            self._load_prompts("test", required=True)
        if stage == "predict":
            self._load_prompts(self._predicted, required=True)
        else:
            self._load_texts("val_pretrain")

    def train_dataloader(self) -> ResumableLoader:
        """Build the loader of prompts with `pretrain_ratio` texts per episode.

        Raises:
            ValueError: that is less than one text per rollout.
        """
        prompts = self.training_stream("train", collate_prompts, batch_size=self.batch_size)
        streams = {"prompts": prompts}
        module = None if self.trainer is None else self.trainer.lightning_module
        if getattr(module, "draws_ahead", False):
            streams["next_prompts"] = Stream(prompts.examples, NextOrder(prompts.order), prompts.collate)
        if self.pretrain is not None:
            episodes = self.batch_size * getattr(module, "samples_per_prompt", 1)
            size = round(self.pretrain_ratio * episodes)
            if size < 1:
                raise ValueError(
                    f"`pretrain_ratio` must give at least one text per rollout: got {self.pretrain_ratio} for "
                    f"{episodes} responses; raise it to {1 / episodes:.3g} or more, or leave out `pretrain`"
                )
            streams["pretrain"] = self.training_stream("pretrain", collate_texts, batch_size=size)
        return self.training_loader(JointStream(streams))

    def further_prompts(self, number: int) -> PromptBatch:
        """Return this process's share of one more batch of training prompts, for what a rollout leaves out.

        They come in an order of their own, each prompt once before any comes again.

        Args:
            number: 0, 1, … over the whole run.
        """
        if self._further is None:
            self._further = self.training_stream("train", collate_prompts, batch_size=self.batch_size, order="further")
        batch: PromptBatch = self._further[number]
        return batch

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loaders of `val` prompts, `val_pretrain` texts and `val_sets` that are set."""
        named = {name: partial(collate_prompts, name=name) for name in self.val_sets or {}}
        return self._evaluation("val") + [self.evaluation_loader(f"val_sets.{name}", fn) for name, fn in named.items()]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loaders of test prompts and texts."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Build the loader of prompts for prediction."""
        return self.evaluation_loader(self._predicted, collate_prompts)

    @property
    def _predicted(self) -> str:
        return next((name for name in ("predict", "test", "val") if getattr(self, name) is not None), "predict")

    def _evaluation(self, name: str) -> list[DataLoader[Any]]:
        named: dict[str, Collate] = {name: collate_prompts, "val_pretrain": collate_texts}
        return [self.evaluation_loader(key, fn) for key, fn in named.items() if getattr(self, key) is not None]

    def _load_prompts(self, name: str, *, required: bool) -> None:
        self.load(name, prompt_examples, limit="max_prompt_tokens", required=required)

    def _load_texts(self, name: str) -> None:
        self.load(name, self._blocks, limit="text_tokens")

    def _blocks(
        self, records: Sequence[Located], encoder: Encoder, columns: ColumnNames, tally: DropReport
    ) -> list[TextExample]:
        return pretraining_blocks(records, encoder, columns, block=tally.limit)
