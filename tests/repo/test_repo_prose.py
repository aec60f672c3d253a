"""First lines of docstrings, spelling of identifiers and names of locals."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "lightning_rlhf"
ROOMS = (
    *("callbacks", "cli", "core", "data", "distributed", "engines", "evaluation", "folders", "models", "modules"),
    *("report", "rewards", "rollout", "text", "types.py"),
)
"""Folders and files that are checked."""
BANNED = {
    *("as", "by", "from", "how", "if", "inside", "it", "its", "none", "nothing", "of", "that", "those", "what", "when"),
    *("where", "whether", "which", "who", "whose", "why", "with"),
}
"""Words that begin a clause: a first line begins with a noun phrase or an imperative."""
BRITISH = re.compile(
    "analys(?:e|ing)|behaviour|binaris|cancell|catalogue|centre|colour|favour|finalis|generalis|initialis|labell|"
    "licence|maximis|minimis|modell|neighbour|normalis|optimis|organis|penalis|quantis|randomis|regularis|serialis|"
    "standardis|summaris|tokenis|utilis|vectoris|visualis"
)
ASIDE = re.compile(r"`[^`]*`|,? ?[\[(][^()\[\]]*[\])]")
"""Code, intervals, and parentheses with the comma before them, which introduces a shape."""
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and description of every fault in a source file."""
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if docstring:
            line = node.body[0].lineno
            yield from ((line, fault) for fault in faults_of_line(docstring.split("\n")[0]))
        for name in identifiers(node):
            if BRITISH.search(name.lower()):
                yield node.lineno, f"British spelling: {name}"
        if "found" in locals_of(node):
            yield node.lineno, "a local called `found`: name what it holds"


def faults_of_line(line: str) -> Iterator[str]:
    word = re.match(r"\w*", line)[0].lower()
    if word in BANNED:
        yield f"begins with a clause: {line}"
    if ASIDE.sub("", ASIDE.sub("", line)).count(",") > 1:  # twice: one parenthesis may hold another
        yield f"more than one comma: {line}"


def identifiers(node: ast.AST) -> list[str]:
    """Names that a node introduces."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return [node.id if isinstance(node, ast.Name) else node.attr]
    return []


def locals_of(node: ast.AST) -> list[str]:
    """Names that a node assigns to, and those of the arguments of a lambda."""
    if isinstance(node, ast.Lambda):
        return [argument.arg for argument in node.args.args]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def files() -> list[Path]:
    paths = [PACKAGE / name for name in ROOMS]
    assert all(path.exists() for path in paths)
    return sorted(file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path]))


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_prose_is_plain(file: Path) -> None:
    lines = [f"{file}:{line}: {fault}" for line, fault in faults(file.read_text(encoding="utf-8"))]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""What flows through the library."""', "begins with a clause: What flows"),
        ('def f():\n    """Whether x is y."""', "begins with a clause: Whether x"),
        ('class A:\n    """Those of the reward inside."""', "begins with a clause: Those of"),
        ('"""Take a folder, a file, or a name."""', "more than one comma"),
        ("normalised = 1", "British spelling: normalised"),
        ("def initialise(): ...", "British spelling: initialise"),
        ("def f(colour): ...", "British spelling: colour"),
        ("self.behaviour = 1", "British spelling: behaviour"),
        ("for found in rows: ...", "a local called `found`"),
        ("a, found = 1, 2", "a local called `found`"),
        ("key = lambda found: found[0]", "a local called `found`"),
    ],
)
def test_each_fault_is_reported(source: str, fault: str) -> None:
    [(line, said)] = faults(source)
    assert fault in said
    assert line in {1, 2}


def test_plain_lines_pass() -> None:
    lines = [
        "Return True if x is y.",
        "Tensors of a rollout.",
        "Log-probs of each token, (B, R), in nats (Ouyang et al. 2022, eq. 2).",
        "The keys `a, b` and `c`, in order.",
        "Random numbers in [0, 1), one per token.",
    ]
    assert not [fault for line in lines for fault in faults_of_line(line)]
