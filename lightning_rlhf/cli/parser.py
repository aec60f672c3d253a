"""Argument parser that reports an invalid command line or config in one sentence."""

from __future__ import annotations

import os
import re
import sys
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_rlhf.cli.documents import with_methods
from lightning_rlhf.cli.failure import TRACEBACK, one_line
from lightning_rlhf.cli.help import HelpFormatter
from lightning_rlhf.cli.suggestions import suggestion
from lightning_rlhf.cli.words import COMMANDS, expanded
from lightning_rlhf.core import Algorithm

_NOISE = (
    "Expected a path but",
    "Expected a <class 'NoneType'>",
    "Import path lightning_rlhf.ModelSource does not correspond",
    "Does not validate against",
    "Not a valid subclass of",
    "Type collections.abc",
    "Problem with given class_path",
    "a class path (str)",
    "a dict with",
)
"""Beginnings of jsonargparse's complaints about the alternatives of an argument that were not meant."""


class Defaults(Namespace):
    """Default values whose `pop` removes an argument with all nested ones.

    jsonargparse 4.53 removes the defaults of a base class leaf by leaf when a subclass is named, and the rest of a
    nested object would win over the subclass's own: `--model.algorithm=RLOO` would have no baseline.
    """

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove the outermost argument that contains `key`."""
        return super().pop(key.partition(".")[0], default)


class Parser(LightningArgumentParser):
    """Argument parser whose errors are one sentence without the usage and the parsed config."""

    _of_algorithm = False

    def __init__(self, *args: Any, formatter_class: type[HelpFormatter] = HelpFormatter, **options: Any) -> None:
        super().__init__(*args, formatter_class=formatter_class, **options)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse arguments, with shipped configs by their names."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and any(word in COMMANDS for word in words):  # not again in a command's own parser
            try:
                words = with_methods(expanded(words))
            except ValueError as error:
                self.error(str(error))
        elif isinstance(words, list):  # jsonargparse 4.53 hands a nested null down as "None"
            words = [re.sub(r"=None$", "=null", word) for word in words]
        return super().parse_args(words, *rest, **options)

    def add_class_arguments(self, theclass: type, *args: Any, **options: Any) -> list[str]:
        """Add the arguments of a class."""
        self._of_algorithm = isinstance(theclass, type) and issubclass(theclass, Algorithm)
        return super().add_class_arguments(theclass, *args, **options)

    def get_defaults(self, *args: Any, **options: Any) -> Namespace:
        """Defaults of all arguments."""
        defaults = super().get_defaults(*args, **options)
        return Defaults(defaults) if self._of_algorithm else defaults

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error in one sentence and exit with status 2, unless the parser is inside another."""
        if not self.exit_on_error or os.environ.get(TRACEBACK) == "1":
            super().error(message, ex)
        self.exit(2, f"lightning-rlhf: error: {one_line(_sentence(message, ex))}\n")


def _sentence(message: str, ex: BaseException | None) -> str:
    """Format an error as `key (Class): reasons; got value: hint`."""
    keys = re.findall(r'Parser key "(.+?)":', message)
    if not keys:
        hint = suggestion(message, "")
        return f"{message}: {hint}" if hint else message
    classes = re.findall(r"Problem with given class_path '(?:\w+\.)*(\w+)'", message)
    innermost = message[message.rindex("Parser key") :]
    given = re.search(r"(?:Given value|Got value): (?:NestedArg\(key='[^']*', val=)?(.*?)\)?$", innermost, re.MULTILINE)
    reasons = _reasons(innermost, ex)
    hint = suggestion(" ".join(map(_tidied, reasons)), ".".join(keys))
    where = f"`{'.'.join(keys)}`" + (f" ({classes[-1]})" if classes and len(keys) > 1 else "")
    got = given[1] if given else ""
    known = any(got in reason for reason in reasons) or "Namespace(" in got
    said = f"{where}: {'; or '.join(map(_tidied, reasons))}" + ("" if known else f"; got {got[:80]}")
    return f"{said}: {hint}" if hint else said


def _reasons(text: str, ex: BaseException | None) -> list[str]:
    """Extract jsonargparse's reasons against the value without those in `_NOISE`."""
    bullets = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip().startswith("- ")]
    cause = str(_first_cause(ex) or text).strip()
    reasons = [cause, *bullets] if cause.startswith("Expected a ") else [cause]
    kept = [re.sub(r"\.? Got value: .*", "", reason, flags=re.DOTALL) for reason in reasons]
    return list(dict.fromkeys(reason for reason in kept if not reason.startswith(_NOISE))) or [text.strip()]


def _first_cause(error: BaseException | None) -> BaseException | None:
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return error


def _tidied(reason: str) -> str:
    """Replace types by their names."""
    reason = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", reason)
    reason = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", reason).replace("Expected a one of", "expected one of")
    reason = re.sub(r"Expected a dot import path string: (\S+)", r"there is no \1: give a name or dotted path", reason)
    return reason.replace("Expected a ", "expected ", 1)
