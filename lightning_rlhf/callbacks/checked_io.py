"""Reading checkpoints: whole ones only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO

from lightning_rlhf.callbacks.torn import defect


class CheckedIO(TorchCheckpointIO):
    """Lightning's reader and writer of single files, which says in one sentence where a file is torn."""

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """What the file holds.

        Raises:
            ValueError: the file is torn.
        """
        problem = defect(Path(path)) if Path(path).exists() else None
        if problem is not None:
            raise ValueError(f"{path} is torn: {problem}; take another one, or --ckpt_path last")
        return super().load_checkpoint(path, *args, **options)
