"""A checkpoint as plain values: what is in it is data and never runs."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What Lightning wrote, on CPU; tensors are mapped from the file and read when they are used.

    Raises:
        ValueError: the file is torn, holds pickled objects, or is no checkpoint.
    """
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is no whole checkpoint: it was cut short or is another kind of file; use the one before it"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled objects; a pickle can run code when it is loaded, so only plain values and tensors "
            "are read: give a checkpoint of this library"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is no whole checkpoint ({reason}): use the one before it") from error
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        raise ValueError(f"{path} is no checkpoint of a LightningModule: it has no `state_dict`")
    return found
