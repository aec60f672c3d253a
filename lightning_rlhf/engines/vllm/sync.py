"""Transfer of weights from the trainer to vLLM servers."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import logging as transformers_logging

from lightning_rlhf.core.arguments import check_arguments
from lightning_rlhf.engines.vllm.client import Client
from lightning_rlhf.engines.vllm.untied import is_tied, write_output_layer
from lightning_rlhf.models.adapter import is_adapted, merged
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.replica import whole
from lightning_rlhf.models.source import DType
from lightning_rlhf.models.written import write_network

RAM_DISK = Path("/dev/shm")


class Sent(NamedTuple):
    """Weights that were sent.

    Attributes:
        size: bytes.
        fingerprint: a number that changes with the weights.
    """

    size: int
    fingerprint: int


class WeightSync(ABC):
    """Way by which weights reach the servers."""

    @abstractmethod
    def send(self, policy: PolicyModel, clients: Sequence[Client], *, label: str, dtype: DType) -> Sent | None:
        """Have the servers load today's weights; they answer no request meanwhile.

        All processes of a sharded policy must call this; the first sends, and only there clients are given. The
        others get None.

        Args:
            policy: whose weights; an adapter is folded in.
            clients: of all servers.
            label: name of the weights.
            dtype: in which they are sent.

        Raises:
            EngineError: a server did not take them.
            OSError: they cannot be written.
        """

    def model(self, label: str) -> str | None:
        """Return the model that requests must name; None is the server's own.

        Args:
            label: of the weights that were sent last.
        """
        return None

    def close(self) -> None:
        """Remove what was written."""
        return


class SharedFolder(WeightSync):
    """Transfer by a folder that trainer and servers both see.

    The weights are written as safetensors under another name, renamed, and read by the servers in place; then the
    folder before it is removed. Of a sharded policy they are gathered weight by weight into main memory.

    Args:
        folder: an existing folder; None is the RAM disk where there is one, else the system's temporary folder.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        check_arguments(SharedFolder, {"folder": folder})
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"`folder`: there is no folder {folder}; make one that the servers see too")
        self.folder = folder
        self._own: Path | None = None
        self._removal: weakref.finalize[..., Any] | None = None
        self._current: Path | None = None

    def send(self, policy: PolicyModel, clients: Sequence[Client], *, label: str, dtype: DType) -> Sent | None:
        """Write the folder and have every server read it."""
        network = whole(policy.network, policy.blueprint)
        if network is None or not clients:
            return None
        target = self._place() / label
        writing = target.with_name(f".{label}")
        try:
            writing.mkdir()
            with _quiet():
                self.write(network, writing, dtype, untied=any(client.untied for client in clients))
            writing.rename(target)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise OSError(
                error.errno, f"{error.strerror}; the weights for the vLLM servers are written there", str(writing)
            ) from error
        sent = _read(target)
        with ThreadPoolExecutor(len(clients)) as pool:
            list(pool.map(lambda client: self.have_read(client, target, label), clients))
        before, self._current = self._current, target
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return sent

    def write(self, network: Any, folder: Path, dtype: DType, *, untied: bool) -> None:
        """Write what is sent.

        Args:
            network: whole, as transformers or PEFT built it.
            folder: an empty one.
            dtype: of the weights there.
            untied: whether a server needs the output layer as weights of its own.
        """
        network = merged(network) if is_adapted(network) else network
        write_network(network, folder, dtype)
        if untied and is_tied(network):
            write_output_layer(network, folder)

    def have_read(self, client: Client, folder: Path, label: str) -> None:
        """Have a server put into use what was written."""
        _reload(client, folder, label)

    def close(self) -> None:
        """Remove the folder of this run."""
        if self._removal is not None:
            self._removal()
        self._own = self._current = self._removal = None

    def _place(self) -> Path:
        """Return the folder of this run, made at the first call."""
        if self._own is None:
            base = self.folder or (RAM_DISK if RAM_DISK.is_dir() else None)
            self._own = Path(tempfile.mkdtemp(prefix="lightning_rlhf-", dir=base))
            self._own.chmod(0o755)  # a server may be another user's
            self._removal = weakref.finalize(self, shutil.rmtree, self._own, ignore_errors=True)
        return self._own


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the bar that transformers shows while it writes, once a rollout."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _reload(client: Client, folder: Path, label: str) -> None:
    """Have a server read a folder and forget what it computed with other weights."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    client.post("/collective_rpc", body, repeats=False)
    client.post("/reset_prefix_cache", {}, repeats=True)
    client.post("/update_weight_version", {"new_version": label}, repeats=True)


def _read(folder: Path) -> Sent:
    """Size and fingerprint of the weights in a folder: the sum of their words modulo 2⁶⁴."""
    size = fingerprint = 0
    for file in sorted(folder.glob("*.safetensors")):
        size += file.stat().st_size
        words = np.memmap(file, dtype=np.uint64, mode="r", shape=(file.stat().st_size // 8,))
        fingerprint = (fingerprint * 31 + int(words.sum(dtype=np.uint64))) % 2**64
    return Sent(size, fingerprint)
