"""Who may import whom, how long files and functions are, and what no committed file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "lightning_rlhf"
FILES = sorted(PACKAGE.rglob("*.py"))
BELOW = {  # what each room may import of the library beside itself
    "types": set(),
    "folders": set(),
    "core": {"types"},
    "text": {"folders"},
    "models": {"core", "folders", "text", "types"},
    "data": {"core", "text", "types"},
    "engines": {"core", "models", "types"},
    "environments": {"core", "rewards", "text", "types"},
    "rewards": {"core", "folders", "models", "text", "types"},
    "distributed": {"core", "models"},
    "rollout": {"core", "distributed", "engines", "environments", "models", "rewards", "text", "types"},
    "evaluation": {"core", "distributed", "rewards", "rollout", "types"},
    "modules": {"core", "distributed", "engines", "evaluation", "models", "rewards", "rollout", "types"},
    "report": {"core", "text"},
    "callbacks": {"core", "engines", "folders", "models", "report", "rewards", "rollout", "text", "types"},
    "cli": {
        *("callbacks", "core", "data", "engines", "evaluation", "models", "modules", "report", "rewards", "rollout"),
        *("text", "types"),
    },
    "__main__": {"cli"},
    "__init__": set(),
}
OUTSIDE = {
    "core": {"torch"},
    "folders": {"safetensors", "torch"},
    "types": {"torch"},
    "text": {"transformers"},
}  # other packages; the rest is free
LONGEST_FILE, LONGEST_FUNCTION = 250, 40
"""Lines of code: docstrings, comments, blank lines are free, and so is a signature, which is one line an argument."""


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the import in full"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def named(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def code(file: Path) -> tuple[ast.Module, set[int]]:
    """The tree, and the numbers of the lines that hold code: no docstring, no comment, no blank line."""
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return tree, lines


def test_every_room_has_its_place() -> None:
    assert {room(file) for file in FILES} == set(BELOW)


@pytest.mark.parametrize("file", FILES, ids=named)
def test_imports_point_down(file: Path) -> None:
    for name in imported(file):
        package, _, rest = name.partition(".")
        if package == "lightning_rlhf":
            target = rest.split(".")[0]
            assert target == room(file) or target in BELOW[room(file)], (
                f"{named(file)} imports {name}; {room(file)} may import only {sorted(BELOW[room(file)])}"
            )
        elif room(file) in OUTSIDE and package not in sys.stdlib_module_names:
            assert package in OUTSIDE[room(file)], (
                f"{named(file)} imports {package}; it may import {OUTSIDE[room(file)]}"
            )


@pytest.mark.parametrize("file", FILES, ids=named)
def test_file_and_its_functions_are_short(file: Path) -> None:
    tree, lines = code(file)
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = len(lines & set(range(node.body[0].lineno, node.end_lineno + 1)))
            assert length <= LONGEST_FUNCTION, f"{named(file)}: {node.name} has {length} lines in its body"


def test_only_quoted_annotations_look_up() -> None:
    """An import under TYPE_CHECKING costs nothing at run time, but still may not point up."""
    upward = [file for file in FILES if room(file) == "core" and "TYPE_CHECKING" in file.read_text(encoding="utf-8")]
    assert not upward


def committed() -> list[Path]:
    """Tracked files and those that would be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in (REPOSITORY / name for name in sorted(done.stdout.split("\n")) if name) if path.is_file()]


def test_files_are_nouns() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
    assert not [path for path in committed() if path.stem in vague or re.search(r"_v\d+$", path.stem)]


def test_no_machine_and_no_service_is_named() -> None:
    """Paths of somebody's machine, and hosts of model hubs and package registries."""
    machine = r"(?<![\w.])/(?:root|work|home|Users|mnt)/|[A-Z]:\\\\"
    service = r"\b(?:huggingface\.co|hf\.co|pypi\.org|pythonhosted\.org|download\.pytorch\.org|modelscope\.cn)\b"
    found = []
    for path in committed():
        if path == Path(__file__) or path.suffix not in {".py", ".yaml", ".yml", ".toml", ".md", ".sh", ".cfg", ""}:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(f"{machine}|{service}", line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:80]}")
    assert not found


def files_imported(file: Path) -> set[Path]:
    """Files of the library that a file imports, for typing or at run time."""
    paths = [PACKAGE.parent / name.replace(".", "/") for name in imported(file) if name.startswith("lightning_rlhf")]
    modules = [next(filter(None, map(module_file, (path, path.parent))), None) for path in paths]
    return {module for module in modules if module is not None}


def module_file(path: Path) -> Path | None:
    """The file of a module or package; none of another name in it."""
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Names that reach themselves, those that reach each other together."""
    reached = {name: set(others) for name, others in arrows.items()}
    for middle in arrows:
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, ())) for a in reached if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_file_imports_itself_by_a_detour() -> None:
    """Inside a room as well, and for typing: each file can be read and tested after those it imports."""
    arrows = {named(file): {named(other) for other in files_imported(file)} for file in FILES}
    assert circles(arrows) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
