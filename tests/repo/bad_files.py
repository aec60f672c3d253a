"""Files that are no JSONL: encodings, broken JSON, archives, folders, sizes."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from bad_bench import GOOD, Bench, Case, case

LINE = json.dumps(GOOD["sft"]).encode() + b"\n"


def content(name: str, bad: bytes, *says: str, file: str = "bad.jsonl") -> Case:
    """A file with that content, the first word of the sentence its name."""
    return case(f"file-{name}", lambda bench: bench.sft(train=bench.file(bad, file)), *says)


def line(name: str, bad: bytes, *says: str) -> Case:
    """A good line, then this one."""
    return content(name, LINE + bad + b"\n", r"bad\.jsonl, line 2: ", *says)


def place(name: str, make: Callable[[Path], object], *says: str) -> Case:
    """A path at which `make` put something; it returns a path where that has another name than `bad.jsonl`."""

    def arguments(bench: Bench) -> list[str]:
        return bench.sft(train=str(make(bench.place / "bad.jsonl") or bench.place / "bad.jsonl"))

    return case(f"place-{name}", arguments, *says)


def loop(path: Path) -> None:
    path.symlink_to(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


ENCODINGS = [
    content("utf16-little", LINE.decode().encode("utf-16"), "line 1: this is UTF-16: save it as UTF-8"),
    content("utf16-big", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "line 1: this is UTF-16"),
    content("utf16-unmarked", LINE.decode().encode("utf-16-le"), "line 1: NUL bytes"),
    content("utf32", LINE.decode().encode("utf-32"), "line 1: this is UTF-16"),
    line("latin1", '{"prompt": "é", "response": "a"}'.encode("latin-1"), "not UTF-8"),
    line("nul", b'{"prompt": "a\0", "response": "b"}', "NUL bytes"),
    line("torn-character", b'{"prompt": "\xe2\x82', "not UTF-8"),
    line("overlong", b'{"prompt": "\xc0\xaf"}', "not UTF-8"),
    line("raw-surrogate", b'{"prompt": "\xed\xa0\x80", "response": "b"}', "not UTF-8"),
    line("mark-inside", b'\xef\xbb\xbf{"prompt": "a", "response": "b"}', "broken JSON"),
]
BROKEN = [
    line("half-an-object", b'{"prompt": "a"', "broken JSON"),
    line("half-a-text", b'{"prompt": "a', "broken JSON"),
    line("single-quotes", b"{'prompt': 'a'}", "broken JSON"),
    line("trailing-comma", b'{"prompt": "a",}', "broken JSON"),
    line("two-objects", b'{"prompt": "a"} {"prompt": "b"}', "broken JSON"),
    line("comment", b'// {"prompt": "a"}', "broken JSON"),
    line("raw-control", b'{"prompt": "a\x07"}', "broken JSON"),
    line("bad-escape", rb'{"prompt": "\x41"}', "broken JSON"),
    line("prose", b"once upon a time", "broken JSON"),
    line("csv", b"prompt,response", "broken JSON"),
    line("nan", b'{"prompt": "a", "response": "b", "x": NaN}', "`NaN` is no JSON"),
    line("infinity", b'{"prompt": "a", "response": "b", "x": -Infinity}', "`-Infinity` is no JSON"),
    line("huge-float", b'{"prompt": "a", "response": "b", "x": 1e999}', "1e999 is too large"),
    line("huge-integer", b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "4300"),
    line("key-twice", b'{"prompt": "a", "prompt": "b"}', "the key `prompt` occurs twice"),
    line("inner-key-twice", b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "the key `y` occurs twice"),
    line("half-surrogate", rb'{"prompt": "\ud83d", "response": "b"}', "half of a surrogate pair"),
    line("half-surrogate-key", rb'{"prompt": "a", "\udc00": "b"}', "half of a surrogate pair"),
    line("deep", b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    content("pretty-printed", b'{\n  "prompt": "a"\n}\n', "line 1: broken JSON"),
    content("array", json.dumps([GOOD["sft"]]).encode(), "line 1: found a JSON list"),
    content("escape-codes", b'\x1b[2J\x1b]0;mine\x07{"a"', "line 1: broken JSON"),
]
PACKED = [
    content("empty", b"", "holds no record"),
    content("blank", b"\n \n\t\n", "holds no record"),
    content("empty-gzip", gzip.compress(b""), "holds no record", file="bad.jsonl.gz"),
    content("no-gzip", LINE, "is not a whole gzip file", file="bad.jsonl.gz"),
    content("torn-gzip", gzip.compress(LINE * 50)[:-6], "is not a whole gzip file", file="bad.jsonl.gz"),
    content("gzip-head", gzip.compress(LINE)[:5], "is not a whole gzip file", file="bad.jsonl.gz"),
    content("changed-gzip", gzip.compress(LINE)[:-8] + bytes(8), "is not a whole gzip file", file="bad.jsonl.gz"),
    content("gzip-inside", gzip.compress(b"x\n"), "line 1: broken JSON", file="bad.jsonl.gz"),
    content("gzip-unnamed", gzip.compress(LINE), "this is a gzip file: end its name in .gz"),
    content("zip", b"PK\x03\x04rest", "this is a zip archive"),
    content("parquet", b"PAR1\x15\x04", "this is a Parquet file"),
    content("bomb", gzip.compress(bytes(2**26 + 2**20), 1), "line 1: longer than 67108864 bytes", file="bad.jsonl.gz"),
    content("long-rows", json.dumps({"prompt": "a " * 5000, "response": "b"}).encode(), "no row is left", "max_tokens"),
]
PLACES = [
    place("missing", lambda path: None, "does not exist"),
    place("folder", Path.mkdir, "is a folder"),
    place("loop", loop, "does not exist|[Ss]ymbolic"),
    place("dangling", dangling, "does not exist"),
    place("pipe", os.mkfifo, "is no regular file"),
    place("device", lambda path: "/dev/null", "is no regular file"),
    place("no-match", lambda path: path.with_name("*.jsonl"), "does not exist"),
    place("below-a-file", lambda path: (path.write_bytes(LINE), path / "x.jsonl")[1], "does not exist"),
    place("long-name", lambda path: path.with_name("x" * 300), "File name too long"),
    case("place-second-missing", lambda b: b.sft(f"--data.val={b.place}/no.jsonl"), "no.jsonl does not exist"),
    case("place-no-path", lambda b: b.sft("--data.train=[]"), "no path was given"),
    case("place-empty-name", lambda b: b.sft("--data.train="), "no path was given"),
]
CASES = [*ENCODINGS, *BROKEN, *PACKED, *PLACES]
