"""Log-probs of whole texts kept on disk for later epochs and runs."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_rlhf.folders.atomic import write_folder
from lightning_rlhf.types import TextBatch

FILE = "logprobs.safetensors"


class KeptLogprobs:
    """Log-probs by content of a text, in memory and in a folder.

    Every `write` adds a folder of its own, whole or not at all, so that processes may write and read side by side.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, float] = {}
        self._fresh: dict[bytes, float] = {}
        self._read: set[Path] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def __getitem__(self, key: bytes) -> float:
        return self._known[key]

    def add(self, key: bytes, logprob: float) -> None:
        """Keep the log-prob of a text, nats."""
        self._known[key] = self._fresh[key] = logprob

    def read(self, folder: Path) -> None:
        """Take what any process has written into the folder since the last call.

        Raises:
            ValueError: a file is damaged.
        """
        for file in sorted(set(folder.glob(f"*/{FILE}")) - self._read):
            try:
                with safe_open(file, framework="pt") as part:
                    keys, logprobs = part.get_tensor("keys"), part.get_tensor("logprobs")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged ({error}): delete its folder, and it is computed anew") from error
            self._known |= dict(zip(map(bytes, keys.numpy()), logprobs.tolist(), strict=True))
            self._read.add(file)

    def write(self, folder: Path) -> None:
        """Write what was added since the last call."""
        if not self._fresh:
            return
        name = uuid.uuid4().hex
        keys = torch.frombuffer(bytearray(b"".join(self._fresh)), dtype=torch.uint8).view(len(self._fresh), -1)
        logprobs = torch.tensor(list(self._fresh.values()), dtype=torch.float64)
        with write_folder(folder / name) as part:
            save_file({"keys": keys, "logprobs": logprobs}, part / FILE)
        self._read.add(folder / name / FILE)
        self._fresh = {}


def alone(texts: TextBatch, row: int) -> TextBatch:
    """Return one of the texts without its padding, which is on the right; at least two columns."""
    width = max(2, int(texts.mask[row].sum()))
    return TextBatch(*(field[row : row + 1, :width] for field in texts))


def key_of(text: TextBatch) -> bytes:
    """Digest of the tokens of a text and of which of them are targets."""
    columns = (text.tokens.cpu(), text.mask.cpu(), text.target.cpu())
    return hashlib.sha256(b"".join(column.numpy().tobytes() for column in columns)).digest()
