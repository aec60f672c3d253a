"""Code blocks of the pages: where they stand, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w+-]*)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: page and line, as an editor opens them.
        language: what stands behind the fence.
        text: between the fences, without their indent.
    """

    place: str
    language: str
    text: str

    def commands(self) -> Iterator[Command]:
        """Those of a shell, in turn: comments are left out, lines that end in a backslash joined, `&&` parts them."""
        text = self.text.replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                yield Command.of(words[:end])
                words = words[end + 1 :]


@dataclass(frozen=True)
class Command:
    """One program and its arguments.

    Attributes:
        words: the program, then its arguments, without the folder of an environment (`.venv/bin/`).
        environment: variables set in front of it.
    """

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: list[str]) -> Command:
        """From the words of a line."""
        count = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        environment = dict(word.split("=", 1) for word in words[:count])
        program, *arguments = words[count:]
        return cls((re.sub(r"^\S*/bin/", "", program), *arguments), environment)

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: a fence is not closed, or a block is marked by its indent alone and so has no language.
    """
    found, opening, inside = [], None, []
    previous = ""
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opening is None and fence:
            opening, inside = (number, fence), []
        elif opening is None:
            if line.startswith("    ") and not previous.strip():
                raise ValueError(f"{page}:{number}: a block by indent alone; fence it and name its language")
            previous = line
        elif fence and line.strip() == opening[1]["fence"]:
            indent = len(opening[1]["indent"])
            body = "".join(row[indent:] + "\n" for row in inside)
            found.append(Block(f"{page}:{opening[0]}", opening[1]["language"], body))
            opening, previous = None, line
        else:
            inside.append(line)
    if opening is not None:
        raise ValueError(f"{page}:{opening[0]}: the block does not end")
    return found


def pages(root: Path) -> list[Path]:
    """What a reader reads: at the top, under docs/, and each example's own page."""
    found = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*/README.md")]
    return sorted(path for path in found if path.name != "CHANGELOG.md")
