"""Checkpoint files that are verified on reading and written without a second copy in memory."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from lightning_rlhf.callbacks.torn import defect


class CheckedIO(TorchCheckpointIO):
    """Lightning's reader and writer of single files, with an error in one sentence for a corrupt file.

    Tensors go to the file one by one: Lightning's own writer holds the file in memory, and writes it twice.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to a path that the caller renames: a kill leaves half of it.

        Raises:
            OSError: the disk is full or broken.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Raises:
            ValueError: the file is truncated or corrupt.
        """
        path = expanduser(path)
        problem = defect(Path(path)) if Path(path).exists() else None
        if problem is not None:
            raise ValueError(f"{path} is torn: {problem}; take another one, or --ckpt_path last")
        return super().load_checkpoint(path, *args, **options)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint by `torch.save`.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's own writer, where the file under it fails
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def is_of_the_disk(error: BaseException) -> bool:
    """Return True if a checkpoint was not written because a disk is full, broken or read-only.

    DeepSpeed passes on the RuntimeError of torch's own writer, whose message names the place where it stopped.
    """
    if isinstance(error, RuntimeError):
        return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "No space left"))
    return isinstance(error, OSError | CheckpointException)
