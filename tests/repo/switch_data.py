"""Switches of data: the batches that small files give, and what a record is read as."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import datasets
from lightning import LightningDataModule
from switch_bench import Bench
from switch_harness import Table, case, to
from transformers import PreTrainedTokenizerFast

from lightning_rlhf.data import (
    ColumnNames,
    ComparisonDataModule,
    DemonstrationDataModule,
    HubData,
    LabeledDataModule,
    PromptDataModule,
    ReasoningGymRows,
)
from lightning_rlhf.data.columns import template_arguments
from lightning_rlhf.data.formats import demonstration_of, label_of, prompt_of, text_of
from lightning_rlhf.data.rankings import ranking_of
from lightning_rlhf.data.sources import read_records

ROW: dict[str, Any] = {"prompt": "a", "question": "b", "response": "c", "answer": "d", "text": "e", "document": "f"}
ROW |= {"label": True, "liked": False}
ROW |= {"tools": [{"name": "f"}], "functions": [{"name": "g"}], "chat_template_kwargs": {"x": 1}, "options": {"x": 2}}
PAIR = {"prompt": "a", "chosen": "b", "best": "c", "rejected": "d", "worst": "e", "margin": 1.0, "gap": 2.0}
SCORED = {"prompt": "a", "responses": ["b", "c"], "answers": ["d", "e"], "scores": [1, 0], "ratings": [0, 1]}
SCORED |= {"systems": ["x", "y"], "authors": ["v", "w"]}
PLACED = {"prompt": "a", "responses": ["b", "c"], "answers": ["d", "e"], "ranks": [1, 0], "places": [0, 1]}
CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: prompts.jsonl}, {split: held_out, path: other_prompts.jsonl}]
- config_name: other
  data_files: [{split: train, path: demonstrations.jsonl}]
---
"""


def table(bench: Bench) -> Table:
    common = {"tokenizer": bench.tokenizer, "batch_size": 2}

    def files(kind: str, *stages: str) -> dict[str, Any]:
        return dict.fromkeys(stages, bench.file(kind))

    switched = {
        "batch_size": to(3),
        "eval_batch_size": to(1),
        "prompt_role": to("user"),
        "chat_template_kwargs": to({"opening": "b"}, prompt_role="user", tokenizer=opened(bench)),
        "columns": to(ColumnNames(prompt="question")),
        "tokenizer": to(bench.other_tokenizer),
        "num_workers": to(1, by=made_elsewhere),
        "seed": to(1),
    }
    texts = {"pretrain": bench.file("texts")}
    return {
        ColumnNames: case(
            records,
            prompt=to("question"),
            response=to("answer"),
            chosen=to("best"),
            rejected=to("worst"),
            margin=to("gap"),
            responses=to("answers"),
            scores=to("ratings"),
            ranks=to("places"),
            systems=to("authors"),
            label=to("liked"),
            text=to("document"),
            tools=to("functions"),
            chat_template_kwargs=to("options"),
        ),
        ComparisonDataModule: case(
            batches,
            common | files("rankings", "train", "val", "test"),
            **dict.fromkeys(("train", "val", "test"), to(bench.file("other_rankings"))),
            demonstrations=to(bench.file("demonstrations")),
            max_tokens=to(6),
            **switched,
        ),
        DemonstrationDataModule: case(
            batches,
            common | files("demonstrations", "train", "val", "test"),
            **dict.fromkeys(("train", "val", "test"), to(bench.file("other_demonstrations"))),
            loss_on_prompt=to(True),
            max_tokens=to(6),
            **switched,
        ),
        HubData: case(
            hub_rows(str(bench.empty())),
            {"path": copied(bench, "prompts"), "split": "train", "name": "small"},
            path=to(copied(bench, "other_prompts")),
            split=to("held_out"),
            name=to("other"),
        ),
        ReasoningGymRows: case(
            lambda data: [record.row for record in read_records(data)],
            {"task": "chain_sum", "size": 20},
            task=to("decimal_chain_sum"),
            size=to(10),
            seed=to(1),
            part=to("val", share=0.5),
            share=to(0.9, part="train"),
            config=to({"max_terms": 2}),
            instruction=to("Reckon: {question}"),
        ),
        LabeledDataModule: case(
            batches,
            common | files("labeled", "train", "val", "test"),
            **dict.fromkeys(("train", "val", "test"), to(bench.file("other_labeled"))),
            max_tokens=to(6),
            **switched,
        ),
        PromptDataModule: case(
            batches,
            common | files("prompts", "train", "val", "test", "predict"),
            **dict.fromkeys(("train", "val", "test", "predict"), to(bench.file("other_prompts"))),
            pretrain=to(bench.file("other_texts"), **texts),
            val_pretrain=to(bench.file("texts")),
            val_sets=to({"more": bench.file("other_prompts")}),
            pretrain_ratio=to(2.0, **texts),
            max_prompt_tokens=to(3),
            text_tokens=to(6, **texts),
            **switched,
        ),
    }


def opened(bench: Bench) -> PreTrainedTokenizerFast:
    """The tokenizer with a template that takes an argument."""
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.chat_template = "{{ opening }} {{ messages[0].content }} "
    return tokenizer


def copied(bench: Bench, first: str) -> str:
    """A folder as a download from the hub leaves it; the rows of `first` are the training split of `small`."""
    folder = bench.empty()
    (folder / "README.md").write_text(CARD.replace("path: prompts", f"path: {first}"), encoding="utf-8")
    for name in ("prompts", "other_prompts", "demonstrations"):
        shutil.copy(bench.file(name), folder)
    return str(folder)


def hub_rows(cache: str) -> Callable[[HubData], list[Any]]:
    """What is read of hub data, by way of a cache of the test's own."""

    def observe(data: HubData) -> list[Any]:
        with patch.object(datasets.config, "HF_DATASETS_CACHE", cache):
            return [record.row for record in read_records(data)]

    return observe


def batches(data: LightningDataModule) -> dict[str, list[Any]]:
    """Of two epochs of training, and of every evaluation."""
    found = {}
    for stage, serve in _loaders(data).items():
        loaders = serve()
        for number, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            found[f"{stage}/{number}"] = [batch for _ in range(2) for batch in loader]
    return found


def made_elsewhere(data: LightningDataModule) -> bool:
    """Whether batches come from another process: their tensors lie in shared memory then."""
    first = next(iter(_loaders(data)["train"]()))
    while not hasattr(first, "tokens"):
        first = first["prompts"]
    return first.tokens.is_shared()


def records(columns: ColumnNames) -> list[Any]:
    """What rows with every key and a second one like it are read as."""
    read = [fn(ROW, columns) for fn in (prompt_of, demonstration_of, label_of, text_of, template_arguments)]
    return read + [ranking_of(row | {"question": "z"}, columns) for row in (PAIR, SCORED, PLACED)]


def _loaders(data: LightningDataModule) -> dict[str, Callable[[], Any]]:
    stages = {"fit": "train", "validate": "val", "test": "test"}
    if isinstance(data, PromptDataModule):
        stages["predict"] = "predict"
    for stage in stages:
        data.setup(stage)
    return {name: getattr(data, f"{name}_dataloader") for name in stages.values()}
