"""Whatever is wrong with what a user gives, the command line says so in one sentence and ends with a status."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import bad_checkpoints
import bad_configs
import bad_files
import bad_models
import bad_rows
import jsonargparse._optionals
import jsonargparse._parameter_resolvers
import pytest
from bad_bench import Bench, Case

import lightning_rlhf
from lightning_rlhf.cli import console
from lightning_rlhf.cli.failure import sentence, status

READ = [*bad_rows.CASES, *bad_files.ENCODINGS, *bad_files.BROKEN]
"""Cases of one line: all of them by the data module, which is quick, every fourth by the command line as well."""
TABLES = (bad_configs.CASES, bad_models.CASES, bad_checkpoints.CASES, bad_files.PACKED, bad_files.PLACES)
CASES = [*READ[::4], *(case for table in TABLES for case in table)]
_read_docstrings = functools.cache(jsonargparse._optionals.parse_docs)
LONGEST = 700
"""Characters of a sentence, the paths in it included."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the docstrings of a class once, not once a case: they are for `--help` only."""
    for module in (jsonargparse._optionals, jsonargparse._parameter_resolvers):
        monkeypatch.setattr(module, "parse_docs", _read_docstrings)


@pytest.fixture
def bench(tiny: Any, workplace: Path, quick: None) -> Bench:
    return Bench(tiny, workplace)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the console script; what is raised beside `SystemExit` would be a traceback."""
    monkeypatch.setattr("sys.argv", ["lightning-rlhf", *arguments])
    try:
        console()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_in_one_sentence(case: Case, bench: Bench, monkeypatch: Any, capsys: Any) -> None:
    code = run(case.arguments(bench), monkeypatch)
    written = capsys.readouterr().err
    *_, last = written.rstrip("\n").split("\n")
    assert last.startswith("lightning-rlhf: error: ")
    assert code == case.code, last
    for pattern in case.says:
        assert re.search(pattern, last), (pattern, last)
    assert written.count("lightning-rlhf: error: ") == 1
    assert "Traceback" not in written
    assert len(last) < LONGEST
    assert last.isprintable()


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_bad_line_is_refused_by_the_reader(case: Case, bench: Bench) -> None:
    """By the module that the command line would build, and with the sentence it would print."""
    given = dict(flag.removeprefix("--").split("=", 1) for flag in case.arguments(bench) if flag.startswith("--data"))
    paths = {name: given[f"data.{name}"] for name in ("train", "pretrain") if f"data.{name}" in given}
    module = getattr(lightning_rlhf, given["data"])(**paths, tokenizer=bench.tiny.policy)
    with pytest.raises(ValueError) as found:  # noqa: PT011
        module.setup("fit")
    said = sentence(found.value)
    assert said is not None
    assert status(found.value) == case.code
    assert all(re.search(pattern, said) for pattern in case.says), said
    assert len(said) < LONGEST


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert len(CASES) >= 150
    assert len({case.name for case in [*CASES, *READ]}) == len(CASES) + len(READ) - len(READ[::4])


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_good_input_runs(kind: str, bench: Bench, monkeypatch: Any) -> None:
    """The negative control: nothing is wrong with what the cases leave as it is."""
    assert run(getattr(bench, kind)(), monkeypatch) == 0
