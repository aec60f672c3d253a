"""Checkpoints read as plain values, without running anything in them."""

from __future__ import annotations

import re
from os.path import expanduser
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem


def has_file(path: str | Path) -> bool:
    """Return True if a checkpoint's path is a local file, readable before anything is built.

    Otherwise it may be a folder, as strategies that shard a model write, one of Lightning's words, such as `last`, or
    an address.

    Raises:
        ValueError: what is there can't be a checkpoint, or nothing here can read such an address.
    """
    try:
        get_filesystem(path)
    except (ValueError, ImportError) as error:
        raise ValueError(f"`ckpt_path`: nothing here can read {path}: {error}") from error
    here = Path(expanduser(path))
    if here.is_dir() and not any(here.iterdir()):
        raise ValueError(f"`ckpt_path`: {path} is an empty folder: give the checkpoint in it or beside it")
    if here.exists() and not (here.is_dir() or here.is_file()):
        raise ValueError(f"`ckpt_path`: {path} is no regular file: give a checkpoint")
    return here.is_file()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a Lightning checkpoint on the CPU; tensors are memory-mapped and read on use.

    Raises:
        ValueError: the file is truncated, holds pickled objects, is no checkpoint, or one of Lightning 1.
    """
    path = expanduser(path)
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is no whole checkpoint: it was cut short or is another kind of file; use the one before it"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled objects; a pickle can run code when it is loaded, so only plain values and tensors "
            "are read: give a checkpoint of this library"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is no whole checkpoint ({reason}): use the one before it") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no checkpoint of a LightningModule: it has no `state_dict`")
    check_version(checkpoint.get("pytorch-lightning_version", "2.0"), path=path)
    return checkpoint


def check_version(version: Any, *, path: str | Path) -> None:
    """Raise unless a checkpoint is of Lightning 2 or later: older ones lack keys that Lightning needs.

    Raises:
        ValueError: it is not.
    """
    major = re.match(r"(\d+)\.\d", str(version))
    if major is None or int(major[1]) < 2:
        raise ValueError(
            f"{path} names {str(version)[:40]!r} as the version of Lightning that wrote it: give a checkpoint that "
            "this library wrote, with Lightning 2 or later"
        )
