"""Shipped configs by name, with the command `lightning-rlhf configs` to list and print them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

PLACES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
"""Folders of the configs: in the package, which links to those of a clone, or in a clone without the links."""


def shipped() -> dict[str, Path]:
    """Paths of the shipped configs by name, those of strategies as `strategy/NAME`."""
    folder = next((place for place in PLACES if place.is_dir()), PLACES[0])
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("strategy/*.yaml")])
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def path_of(config: str) -> str:
    """Return the path of a shipped config by its name; existing files and names with a suffix are unchanged.

    A folder of the name, as `reward/` beside the data, is no file.

    Raises:
        ValueError: it is no file, and none of that name is shipped.
    """
    place = Path(config).expanduser()
    is_file = place.exists() and not place.is_dir()
    if is_file or not config.replace("/", "").replace("_", "").isalnum():
        return config
    known = shipped()
    if config in known:
        return str(known[config])
    near = get_close_matches(config, known, n=2) or [name for name in known if name.endswith(f"/{config}")]
    hint = f"did you mean {' or '.join(near)}?" if near else "`lightning-rlhf configs` lists them"
    raise ValueError(f"`--config`: there is no file {config}, and no shipped config of that name: {hint}")


def main(arguments: Sequence[str]) -> None:
    """List the shipped configs, or print one.

    Raises:
        SystemExit: there is none of that name.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-rlhf configs",
        description="List the shipped configs, or print one to start your own from.",
        epilog="lightning-rlhf configs grpo > mine.yaml",
    )
    parser.add_argument("name", nargs="?", help="of the config to print")
    name = parser.parse_args(arguments).name
    known = shipped()
    if name is None:
        width = max(map(len, known))
        print("\n".join(f"{each:{width}}  {_first_sentence(path)}" for each, path in known.items()))
    elif name in known:
        print(known[name].read_text(encoding="utf-8"), end="")
    else:
        near = get_close_matches(name, known, n=2)
        parser.error(f"there is no config {name}" + (f": did you mean {' or '.join(near)}?" if near else ""))


def _first_sentence(path: Path) -> str:
    """First line of the header comment."""
    first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return first.rstrip(".")
