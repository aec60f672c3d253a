"""`load_from_checkpoint` that takes values from a file, and never the name of something to import."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from lightning_rlhf.models.checkpoint import read_checkpoint


class CheckedRevival:
    """For a LightningModule: stands before it among the bases."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> Any:
        """The module of a checkpoint, its arguments from the hyper-parameters in it; see Lightning for `options`.

        Raises:
            ValueError: the file is torn or pickled, or names a class of a package that is not imported: whoever trusts
                it imports it first.
        """
        check_names(read_checkpoint(checkpoint_path).get("hyper_parameters", {}), source=str(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, **(options | {"weights_only": True}))  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Build the networks first, if that was not done here: a notebook's strategy builds them in other processes."""
        self.configure_model()  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, *args, **options)  # type: ignore[misc]


def check_names(hyperparameters: Any, *, source: str) -> None:
    """That no dotted name among the values would import a package.

    Raises:
        ValueError: one would.
    """
    for name in _dotted(hyperparameters):
        package = name.partition(".")[0]
        if package not in sys.modules and find_spec(package) is not None:
            raise ValueError(
                f"{source} names {name}, which is not imported, and a checkpoint must not import: if you trust it, "
                f"`import {package}` first"
            )


def _dotted(value: Any) -> Iterator[str]:
    """Strings that could be the path of a class or a function."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _dotted(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _dotted(inner)
    elif isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split(".")):
        yield value
