"""`lightning-rlhf fit|validate|test|predict --config …`. Cheap to import: Lightning comes in with `main`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any


def main(args: Sequence[str] | None = None) -> Any:
    """Parse the command line (or `args`) and run it; returns the CLI object, whose `trainer` and `model` are live."""
    if list(sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"lightning-rlhf {version('lightning-rlhf')}")
        return None
    from lightning_rlhf.command import RLHFCLI

    return RLHFCLI(args=args)


def console() -> None:
    """The console script; like `python -m`, it finds your modules in the working directory."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    main()
