"""Safety checks of sharded checkpoints before Lightning unpickles them."""

from __future__ import annotations

import io
import os
import pickle
import sys
from functools import partial
from importlib import import_module
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_rlhf.models.checkpoint import check_version

_DCP = "torch.distributed.checkpoint"
INDEX = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Classes in the index of a sharded checkpoint: module → names. All of them only hold values."""
DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "deepspeed.runtime.zero.config": {"OffloadDeviceEnum", "ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
}
"""Classes in DeepSpeed's files beside plain values and tensors."""


def guard(strategy: Strategy) -> None:
    """Make a strategy check a checkpoint's folder before it loads it, or report that it is unreadable."""
    if not isinstance(strategy.load_checkpoint, partial):
        strategy.load_checkpoint = partial(_load, strategy.load_checkpoint)  # type: ignore[method-assign]


def _load(load: Any, checkpoint_path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    checkpoint_path = expanduser(checkpoint_path)
    if Path(checkpoint_path).is_dir():
        check_folder(Path(checkpoint_path))
    try:
        checkpoint: dict[str, Any] = load(checkpoint_path, *arguments, **options)
    except IsADirectoryError as error:
        raise ValueError(
            f"`ckpt_path`: {checkpoint_path} is a folder, as strategies that shard a model write: set the "
            "`trainer.strategy` that wrote it"
        ) from error
    check_version(checkpoint.get("pytorch-lightning_version", ""), path=checkpoint_path)
    return checkpoint


def check_folder(folder: Path) -> None:
    """Raise unless the files that FSDP2, FSDP1 or DeepSpeed would unpickle hold plain values and tensors.

    Raises:
        ValueError: one holds something else, is truncated, or lies outside the folder.
    """
    for name in ("latest", "latest_universal"):  # where DeepSpeed writes which folder inside is meant
        if (folder / name).is_file():
            tag = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or tag == "..":
                raise ValueError(
                    f"{folder / name} leads out of the folder, to {tag!r}: give the folder as it was saved"
                )
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in folders):
            if path.is_symlink():
                raise ValueError(f"{path} leads out of the checkpoint's folder: give the folder as it was saved")
        for path in (Path(place, name) for name in files):
            if path.suffix == ".pt":
                _check(path, path, mmap=True)
            elif path.name.endswith(".metadata"):
                _check_index(path)


def _check_index(path: Path) -> None:
    """Check the index of a sharded checkpoint and the shard values that PyTorch unpickles because of it.

    Tensors are read without unpickling.
    """
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        kinds, places = index.state_dict_metadata, index.storage_data
        if type(kinds) is not dict or type(places) is not dict:  # a subclass could show us something else
            raise TypeError("it maps no names")
        for place, info in places.items():
            if isinstance(kinds.get(place.fqn), TensorStorageMetadata):
                continue
            if info.transform_descriptors or min(info.offset, info.length) < 0:
                raise TypeError(f"{place.fqn} is not stored as it is")
            with (path.parent / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                content = io.BytesIO(file.read(info.length))
            _check(content, path.parent / info.relative_path)
    except pickle.UnpicklingError as error:
        raise ValueError(_PICKLED.format(path, error)) from error
    except (OSError, EOFError, AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is no whole index of a checkpoint ({error}): use the one before it") from error


class _IndexUnpickler(pickle.Unpickler):
    """Unpickler that allows only the classes of a checkpoint's index."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function that the pickle asks for.

        Raises:
            UnpicklingError: an index holds none such.
        """
        if name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _check(file: Any, path: Path, **options: Any) -> None:
    """Check that torch reads a file, or a part of one as plain values and tensors."""
    try:
        with torch.serialization.safe_globals(_deepspeed()):
            torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(_PICKLED.format(path, str(error).partition("\n")[0][:120])) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is no whole part of a checkpoint ({reason}): use the one before it") from error


def _deepspeed() -> list[Any]:
    if "deepspeed" not in sys.modules:  # then nothing is about to read its files
        return []
    return [getattr(import_module(module), name) for module, names in DEEPSPEED.items() for name in names]


_PICKLED = (
    "{} holds pickled objects ({}); a pickle can run code when it is loaded, so only plain values and tensors are "
    "read: give a checkpoint of this library"
)
