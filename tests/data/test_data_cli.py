from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from lightning_rlhf.data import ColumnNames, ComparisonDataModule, DemonstrationDataModule, PromptDataModule

SHARED: dict[str, Any] = {
    "batch_size": 5,
    "eval_batch_size": 3,
    "prompt_role": "user",
    "chat_template_kwargs": {"enable_thinking": False},
    "columns": {"prompt": "question", "text": "body"},
    "tokenizer": "some/folder",
    "num_workers": 1,
    "seed": 9,
}
CONFIGS: list[tuple[type, dict[str, Any]]] = [
    (
        PromptDataModule,
        {
            "train": "t.jsonl",
            "val": ["v.jsonl", {"path": "owner/name", "split": "held_out", "name": "small"}],
            "test": "u.jsonl",
            "predict": "p.jsonl",
            "pretrain": "x.jsonl",
            "val_pretrain": "y.jsonl",
            "pretrain_ratio": 2.5,
            "max_prompt_tokens": 12,
            "text_tokens": 13,
        },
    ),
    (
        ComparisonDataModule,
        {
            "train": ["t.jsonl"],
            "val": "v.jsonl",
            "demonstrations": {"path": "owner/name", "split": "train"},
            "max_tokens": 14,
        },
    ),
    (DemonstrationDataModule, {"train": "t.jsonl", "test": "u.jsonl", "loss_on_prompt": True, "max_tokens": 15}),
]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns of arguments given twice, and takes pytest's for its own."""
    monkeypatch.setattr("sys.argv", ["test"])


class Nothing(LightningModule):
    """A model that is only parsed."""


def parse(*arguments: str) -> LightningCLI:
    return LightningCLI(Nothing, LightningDataModule, subclass_mode_data=True, run=False, args=list(arguments))


@pytest.mark.parametrize(("kind", "own"), CONFIGS)
def test_yaml_sets_every_argument(tmp_path: Path, kind: type, own: dict[str, Any]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"class_path": kind.__name__, "init_args": SHARED | own}}))
    data = parse("--config", str(config)).datamodule
    assert type(data) is kind
    for name, value in (SHARED | own).items():
        expected = ColumnNames(prompt="question", text="body") if name == "columns" else value
        assert getattr(data, name) == expected, name


@pytest.mark.parametrize(("kind", "own"), CONFIGS)
def test_print_config_round_trips(
    tmp_path: Path, kind: type, own: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, printed = tmp_path / "config.yaml", tmp_path / "printed.yaml"
    config.write_text(yaml.safe_dump({"data": {"class_path": kind.__name__, "init_args": SHARED | own}}))
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(config), "--print_config")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["data"]["init_args"].items() >= own.items()
    printed.write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", str(printed), "--print_config")
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(text)


def test_flags_set_nested_columns_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    data = parse("--data=PromptDataModule", "--data.train=t.jsonl", "--data.columns.prompt=q").datamodule
    assert (data.train, data.columns) == ("t.jsonl", ColumnNames(prompt="q"))
    with pytest.raises(SystemExit) as stopped:
        parse("--data=PromptDataModule", "--data.columns.promt=q")
    assert stopped.value.code == 2
    assert "promt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ComparisonDataModule, DemonstrationDataModule])
def test_training_file_is_needed_for_training_alone(kind: type) -> None:
    data = parse(f"--data={kind.__name__}", "--data.batch_size=3").datamodule
    with pytest.raises(ValueError, match="needs `train`"):
        data.setup("fit")
    with pytest.raises(ValueError, match="needs `val`"):
        data.setup("validate")


@pytest.mark.parametrize(("kind", "own"), CONFIGS)
def test_help_documents_every_argument(kind: type, own: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(f"--data.help={kind.__name__}")
    text = " ".join(capsys.readouterr().out.split()).split("Help for", 1)[1]
    for name in SHARED | own:
        option = f"columns.{next(iter(SHARED['columns']))}" if name == "columns" else name
        assert re.search(rf"--data\.{option}\+? \S+ [a-z][^(]*\w.*?\(type:", text), name
