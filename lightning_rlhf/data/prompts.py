"""Data module of prompts, with an endless stream of pretraining text beside them (PPO-ptx)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.core.checks import check_positive
from lightning_rlhf.data.collate import collate_prompts, collate_texts
from lightning_rlhf.data.columns import ColumnNames
from lightning_rlhf.data.datamodule import TextDataModule, at_least
from lightning_rlhf.data.drop_report import DropReport
from lightning_rlhf.data.examples import TextExample, pretraining_blocks, prompt_examples
from lightning_rlhf.data.loader import ResumableLoader
from lightning_rlhf.data.records import Located
from lightning_rlhf.data.sources import Source
from lightning_rlhf.data.stream import JointStream
from lightning_rlhf.text import Encoder


class PromptDataModule(TextDataModule):
    """Batches `{"prompts": PromptBatch}` for PPO, with `"pretrain": TextBatch` if `pretrain` is set.

    Prompts are rows with `{"prompt"}`, other keys kept for the reward; pretraining rows have `{"text"}`. Each may come
    from paths (JSONL, Parquet, CSV, patterns, saved datasets), from the hub (OWNER/NAME:SPLIT, `HubData`) or, in
    Python, be a `datasets.Dataset` or a list. Evaluation serves bare batches from a list of loaders: prompts, then
    texts where `val_pretrain` is given.

    Args:
        train: prompts to train on.
        val: prompts to validate on.
        test: prompts to test on.
        predict: prompts to respond to in `predict`; None for `test`, or else `val`.
        pretrain: pretraining documents to mix into training.
        val_pretrain: pretraining documents to validate and test on.
        batch_size: prompts per process and rollout.
        eval_batch_size: prompts, or texts, per process and evaluation batch; None for `batch_size`.
        pretrain_ratio: pretraining texts per episode, where an episode is one response (Ouyang et al. 2022, C.4).
        max_prompt_tokens: longer prompts are dropped and counted, tokens.
        text_tokens: length of a pretraining text, tokens.
        prompt_role: role under which a text prompt becomes a message for the chat template; None leaves it plain text.
        chat_template_kwargs: arguments of the chat template for every dialogue, such as `{"enable_thinking": false}`; a
            row's own come first.
        columns: names of the keys in the files.
        tokenizer: a tokenizer, its folder or hub name; None for that of the module being trained.
        num_workers: processes that assemble batches; 0 for none.
        seed: seed of the order of prompts and texts; None is that of `seed_everything`, else 0.

    Raises:
        ValueError: a size is too small.
    """

    def __init__(
        self,
        train: Source = None,
        val: Source = None,
        test: Source = None,
        predict: Source = None,
        pretrain: Source = None,
        val_pretrain: Source = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        pretrain_ratio: float = 8.0,
        max_prompt_tokens: int = 1024,
        text_tokens: int = 512,
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
        check_positive(pretrain_ratio=pretrain_ratio)
        self.train = train
        self.val = val
        self.test = test
        self.predict = predict
        self.pretrain, self.val_pretrain = pretrain, val_pretrain
        self.pretrain_ratio = pretrain_ratio
        self.max_prompt_tokens = at_least(1, max_prompt_tokens=max_prompt_tokens)
        self.text_tokens = at_least(2, text_tokens=text_tokens)

    def setup(self, stage: str) -> None:
        """Read the rows of a stage (`fit`, `validate`, `test` or `predict`).

        Raises:
            ValueError: its files were not named or cannot be read.
        """
        if stage == "fit":
            self._load_prompts("train", required=True)
            self._load_texts("pretrain")
        if stage in ("fit", "validate"):
            self._load_prompts("val", required=stage == "validate" and self.val_pretrain is None)
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
        streams = {"prompts": self.training_stream("train", collate_prompts, batch_size=self.batch_size)}
        if self.pretrain is not None:
            module = None if self.trainer is None else self.trainer.lightning_module
            episodes = self.batch_size * getattr(module, "samples_per_prompt", 1)
            size = round(self.pretrain_ratio * episodes)
            if size < 1:
                raise ValueError(
                    f"`pretrain_ratio` must give at least one text per rollout: got {self.pretrain_ratio} for "
                    f"{episodes} responses; raise it to {1 / episodes:.3g} or more, or leave out `pretrain`"
                )
            streams["pretrain"] = self.training_stream("pretrain", collate_texts, batch_size=size)
        return self.training_loader(JointStream(streams))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Build the loaders of `val` prompts and `val_pretrain` texts if they are set."""
        return self._evaluation("val")

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
        named = {name: collate_prompts, "val_pretrain": collate_texts}
        return [self.evaluation_loader(key, fn) for key, fn in named.items() if getattr(self, key) is not None]

    def _load_prompts(self, name: str, *, required: bool) -> None:
        self.load(name, prompt_examples, limit="max_prompt_tokens", required=required)

    def _load_texts(self, name: str) -> None:
        self.load(name, self._blocks, limit="text_tokens")

    def _blocks(
        self, records: Sequence[Located], encoder: Encoder, columns: ColumnNames, tally: DropReport
    ) -> list[TextExample]:
        return pretraining_blocks(records, encoder, columns, block=tally.limit)
