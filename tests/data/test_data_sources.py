"""The same rows from JSONL, Parquet, CSV, a saved dataset, a hub name and Python give the same batches."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_rlhf.data import ComparisonDataModule, HubData, PromptDataModule
from lightning_rlhf.data.sources import read_records
from lightning_rlhf.data.tables import hub_data

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
ROWS: list[dict[str, Any]] = [{"prompt": "a", "note": "1"}, {"prompt": "b c"}, {"prompt": "d", "note": "None"}]
CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: train.parquet}, {split: held_out, path: held_out.parquet}]
- config_name: other
  data_files: [{split: train, path: held_out.parquet}]
---
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`ROWS` in every form; its copy of a hub dataset has the last row alone as `held_out`."""
    root = tmp_path_factory.mktemp("sources")
    table = datasets.Dataset.from_list(ROWS, features=datasets.Features(dict.fromkeys(("prompt", "note"), _text())))
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "rows.csv").write_text("prompt,note\na,1\nb c,\nd,None\n")
    (root / "hub").mkdir()
    (root / "hub/README.md").write_text(CARD)
    for path, part in (("rows", table), ("hub/train", table), ("hub/held_out", table.select([2]))):
        part.to_parquet(root / f"{path}.parquet")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(root / "saved")
    return SimpleNamespace(root=root, table=table)


def _text() -> Any:
    return datasets.Value("string")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No network, and a cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


FORMS: dict[str, Callable[[Any], Any]] = {
    "parquet": lambda p: f"{p.root}/rows.parquet",
    "csv": lambda p: f"{p.root}/rows.csv",
    "pattern": lambda p: [f"{p.root}/hub/t*.parquet"],
    "saved": lambda p: f"{p.root}/saved/train",
    "hub": lambda p: HubData(path=f"{p.root}/hub", name="small", split="train"),
    "dataset": lambda p: p.table,
    "formatted": lambda p: p.table.with_format("numpy"),
    "list": lambda p: ROWS,
    "tuple": lambda p: tuple(ROWS),
}


def batches(source: Any, tokenizer: Any, **arguments: Any) -> list[Any]:
    data = PromptDataModule(source, val=source, tokenizer=tokenizer, batch_size=2, **arguments)
    data.setup("fit")
    trained = [batch["prompts"] for batch in data.train_dataloader()]
    return [(b.tokens.tolist(), b.rows) for b in [*trained, *data.val_dataloader()[0]]]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_batches_of_jsonl(places: Any, plain: Any, form: str) -> None:
    assert batches(FORMS[form](places), plain) == batches(f"{places.root}/rows.jsonl", plain)


def test_rows_of_a_table_stay_on_disk(places: Any, plain: Any) -> None:
    """Nothing of a row but its tokens is held: a prompt's columns are read when its batch is made."""
    data = PromptDataModule(f"{places.root}/saved/train", tokenizer=plain, batch_size=3)
    data.setup("fit")
    record = data._examples["train"][0].record
    assert record.table.cache_files
    assert not isinstance(record.table, list)
    assert record.row is not record.row


def test_hub_data_takes_name_and_split(places: Any) -> None:
    path = f"{places.root}/hub"
    found = {
        (name, split): [r.row["prompt"] for r in read_records(HubData(path=path, name=name, split=split))]
        for name, split in (("small", "train"), ("small", "held_out"), ("other", "train"), ("small", "train[:2]"))
    }
    assert list(found.values()) == [["a", "b c", "d"], ["d"], ["d"], ["a", "b c"]]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name:train_sft", HubData(path="owner/name", split="train_sft")),
        ("owner/name:train[:10%]", HubData(path="owner/name", split="train[:10%]")),
        ("owner/name", None),
        ("name:train", None),
        ("./owner/name:train", None),
        ("a/b/c:train", None),
        ("owner/name.jsonl", None),
        ("here/name:train", None),  # `here` is a folder
    ],
)
def test_only_owner_name_split_is_a_hub_name(
    source: str, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_data(source) == expected


def test_path_never_asks_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def load(path: str, *_: Any, **__: Any) -> Any:
        asked.append(path)
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    for source in ("owner/name", "data/train.parquet", "./owner/name:train", "name"):
        with pytest.raises(ValueError, match="does not exist"):
            read_records(source)
    assert not asked
    with pytest.raises(ValueError, match=r"owner/name:train can't be read as a dataset: no network here"):
        read_records("owner/name:train")
    assert asked == ["owner/name"]


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "row": (lambda p: [{"prompt": "a"}, {"question": "b"}], "the given rows, row 1: no key `prompt`; found"),
    "no mapping": (lambda p: [{"prompt": "a"}, "b"], "the given rows, row 1: each row must be a mapping .*found str"),
    "no rows": (lambda p: p.table.select([]), "the given rows hold no row"),
    "parts": (
        lambda p: datasets.DatasetDict(train=p.table),
        r"parts \['train'\]: give one of them, as in data\['train",
    ),
    "stream": (lambda p: p.table.to_iterable_dataset(), "IterableDataset, which has no rows by number"),
    "frame": (lambda p: p.table.to_pandas(), "DataFrame, which has no rows by number.*from_pandas"),
    "several splits": (lambda p: f"{p.root}/saved", "holds several splits: give one of .*saved/train, .*saved/test"),
    "a folder": (lambda p: f"{p.root}/hub", "is a folder"),
    "another split": (lambda p: HubData(path=f"{p.root}/hub", name="small", split="no"), r"small:no can't .*held_out"),
    "no configuration": (
        lambda p: HubData(path=f"{p.root}/hub", split="train"),
        r"hub:train can't .*\['small', 'other",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_source_is_explained(name: str, places: Any, plain: Any) -> None:
    make, message = REFUSED[name]
    data = PromptDataModule(make(places), tokenizer=plain)
    with pytest.raises((ValueError, TypeError), match=message):
        data.setup("fit")


def test_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad\.parquet can't be read as Parquet: "):
        read_records(str(tmp_path / "bad.parquet"))


def test_broken_row_of_a_file_names_file_and_row(places: Any, plain: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": None}]).to_parquet(path)
    with pytest.raises(ValueError, match=r"rows\.parquet, row 1: no key `prompt`; found \[\]"):
        PromptDataModule(str(path), tokenizer=plain).setup("fit")


def test_keys_that_arrow_adds_are_left_out(chat: Any) -> None:
    """One row has a margin and a message with a name; Arrow gives both to every row, as None."""
    named = {"role": "user", "content": "a", "name": "x"}
    rows = [
        {"prompt": [named], "chosen": "b", "rejected": "c"},
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "margin": 2.0},
    ]
    table = datasets.Dataset.from_list(rows[::-1])  # the columns are those of the first row
    assert table[1]["margin"] is None
    records = read_records(table)
    assert "margin" not in records[1].row
    data = ComparisonDataModule(table, tokenizer=chat)
    data.setup("fit")
    assert [example.strength for example in data._examples["train"]] == [[2.0, 0.0], None]


def test_missing_library_says_what_to_install(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read_records(ROWS)) == len(read_records(f"{places.root}/rows.jsonl")) == 3
    assert len(read_records(f"{places.root}/rows.csv")) == 3
    with pytest.raises(ImportError, match=r"pip install datasets"):
        read_records(f"{places.root}/rows.parquet")


CELLS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "image": (lambda kind: kind, lambda cell: cell),
    "images": (lambda kind: datasets.List(kind), lambda cell: [cell]),
    "image in a mapping": (lambda kind: {"x": kind}, lambda cell: {"x": cell}),
}


@pytest.mark.parametrize(("nested", "cell"), CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("kind", ["Image", "Audio"])
@pytest.mark.parametrize("form", ["rows.parquet", "saved", "hub"])
def test_paths_in_cells_are_not_opened(
    form: str, kind: str, nested: Any, cell: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a cell would be fetched when its row is read: in `fit`, and again when a batch is made."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    row = {"prompt": "a", "extra": {"k": 1}, "picture": cell({"bytes": None, "path": "http://127.0.0.1:9/x.png"})}
    stored = {"bytes": datasets.Value("binary"), "path": _text()}
    features = datasets.Features({"prompt": _text(), "extra": datasets.Json(), "picture": nested(stored)})
    table = datasets.Dataset.from_list([row], features=features)
    table.save_to_disk(tmp_path / "saved")
    features["picture"] = nested(getattr(datasets, kind)())
    information = json.loads((tmp_path / "saved/dataset_info.json").read_text()) | {"features": features.to_dict()}
    (tmp_path / "saved/dataset_info.json").write_text(json.dumps(information))
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    (tmp_path / "hub").mkdir()
    for name in ("rows.parquet", "hub/train.parquet"):
        parquet.write_table(table.data.table.replace_schema_metadata(metadata), tmp_path / name)
    source = HubData(path=str(tmp_path / "hub"), split="train") if form == "hub" else str(tmp_path / form)
    data = PromptDataModule(source, tokenizer=plain, batch_size=1)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["prompts"].rows == [row | {"picture": cell({"path": "http://127.0.0.1:9/x.png"})}]
