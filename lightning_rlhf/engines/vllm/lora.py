"""Transfer of a LoRA adapter alone, to servers that add it to the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_rlhf.engines.vllm.client import Client
from lightning_rlhf.engines.vllm.sync import SharedFolder
from lightning_rlhf.models.adapter import is_adapted
from lightning_rlhf.models.source import DType
from lightning_rlhf.models.written import write_network


class AdapterFolder(SharedFolder):
    """Transfer of the adapter by a folder that trainer and servers both see; the base model stays on the servers.

    They are started on the base model with `--enable-lora`, `--max-lora-rank` of the adapter's rank or more, and
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`. A transfer is some megabytes instead of the whole model.

    Args:
        folder: an existing folder; None is the RAM disk where there is one, else the system's temporary folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(folder)
        self._served: dict[str, str] = {}

    def write(self, network: Any, folder: Path, dtype: DType, *, untied: bool) -> None:
        """Write the adapter.

        Raises:
            ValueError: the policy has none.
        """
        if not is_adapted(network):
            raise ValueError("AdapterFolder sends an adapter, and the policy has none: take SharedFolder()")
        write_network(network, folder, dtype)

    def have_read(self, client: Client, folder: Path, label: str) -> None:
        """Have a server add the adapter under its label in place of the one before."""
        client.post(
            "/v1/load_lora_adapter", {"lora_name": label, "lora_path": str(folder)}, repeats=False, answers=False
        )
        before = self._served.get(client.url)
        if before is not None:
            client.post("/v1/unload_lora_adapter", {"lora_name": before}, repeats=False, answers=False)
        self._served[client.url] = label
        client.post("/reset_prefix_cache", {}, repeats=True)
        client.post("/update_weight_version", {"new_version": label}, repeats=True)

    def model(self, label: str) -> str | None:
        """Return the label, the name of the adapter on the servers."""
        return label
