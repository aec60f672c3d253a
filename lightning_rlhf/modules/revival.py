"""A `load_from_checkpoint` that takes values from a file and never the name of code to run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import Callback

from lightning_rlhf.models.checkpoint import check_version, read_checkpoint
from lightning_rlhf.models.shards import guard
from lightning_rlhf.modules.optim import refuse_trainer_settings

OLD = ("hparams", "module_arguments")
"""Key of a module's arguments in checkpoints of Lightning before 1.0, which today's Lightning still reads."""
OPTIONS = ("map_location", "hparams_file", "strict", "weights_only")
"""Arguments of Lightning's `load_from_checkpoint`; all others are the module's."""
CODE = "trust_remote_code"


class CheckedRevival:
    """Mixin for a LightningModule that checks checkpoints; it precedes the module among the bases."""

    def configure_callbacks(self) -> list[Callback]:
        """Make the trainer check checkpoints and refuse settings that the module replaces; adds no callbacks."""
        guard(self.trainer.strategy)  # type: ignore[attr-defined]
        refuse_trainer_settings(self)  # type: ignore[arg-type]
        return []

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> Any:
        """Load a module with the hyperparameters in its checkpoint; see Lightning for `options`.

        An argument of the module among `options` takes the place of the checkpoint's, which is then not looked at.

        Raises:
            ValueError: the file is truncated or pickled, asks to run code that came with a model, or names a class of a
                package that is not imported: whoever trusts it imports it first.
        """
        if options.get("hparams_file") is not None:
            raise ValueError("`hparams_file` is not read: pass the arguments that differ from the checkpoint's")
        checkpoint = read_checkpoint(checkpoint_path)
        check_version(checkpoint.get("pytorch-lightning_version", ""), path=checkpoint_path)
        stored = checkpoint.get("hyper_parameters", {})
        if not isinstance(stored, Mapping) or any(key in checkpoint for key in OLD):
            raise ValueError(f"{checkpoint_path} keeps its arguments as Lightning before 1.0: build the module anew")
        overridden = options.keys() - set(OPTIONS)
        check_names(
            {name: value for name, value in stored.items() if name not in overridden}, source=str(checkpoint_path)
        )
        return super().load_from_checkpoint(checkpoint_path, **(options | {"weights_only": True}))  # type: ignore[misc]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load weights, after building the networks if a notebook's strategy built them in other processes."""
        self.configure_model()  # type: ignore[attr-defined]
        return super().load_state_dict(state_dict, *args, **options)  # type: ignore[misc]


def check_names(hyperparameters: Any, *, source: str) -> None:
    """Raise if hyperparameters would run a model's own code or import a package.

    Raises:
        ValueError: one does.
    """
    for key, value in _leaves(hyperparameters, ""):
        if CODE in key and value not in (False, None):
            raise ValueError(
                f"{source} asks for `{CODE}`, and a checkpoint must not run code: if you have read the code that comes "
                f"with the model, pass that argument yourself, as load_from_checkpoint(..., "
                f"{key.partition('.')[0]}=ModelSource(path=..., {CODE}=True))"
            )
        if _may_hold_config(value):
            raise ValueError(f"{source}: `{key}` is a config in a text, {value[:80]!r}: pass that argument yourself")
        if not _is_dotted(value):
            continue
        package = value.partition(".")[0]
        if package in sys.stdlib_module_names:
            raise ValueError(
                f"{source} names {value} of Python's own library, and a checkpoint must not run it: pass `"
                f"{key.partition('.')[0]}` yourself"
            )
        if package not in sys.modules and find_spec(package) is not None:
            raise ValueError(
                f"{source} names {value}, which is not imported, and a checkpoint must not import: if you trust it, "
                f"`import {package}` first"
            )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested values, each with its keys joined by dots."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _is_dotted(value: Any) -> bool:
    """Return True if a value could be the import path of a class or a function."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))


def _may_hold_config(value: Any) -> bool:
    """Return True if a text may be YAML for jsonargparse with a key that decides what runs.

    A backslash between quotes counts, because it could spell such a key in another way.
    """
    return isinstance(value, str) and (CODE in value or "class_path" in value or ('"' in value and "\\" in value))
