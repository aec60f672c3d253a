"""Transfer of weights from GPU to GPU, by vLLM's own NCCL engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_rlhf.core.arguments import check_fields
from lightning_rlhf.engines.vllm.client import Client
from lightning_rlhf.engines.vllm.sync import Sent, WeightSync
from lightning_rlhf.models.adapter import is_adapted, merged
from lightning_rlhf.models.policy import PolicyModel
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.replica import whole_tensor
from lightning_rlhf.models.source import DType

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(kw_only=True, eq=False)
class NCCL(WeightSync):
    """Broadcast from the first process's GPU to those of the servers.

    The trainer joins a group with the workers of every server (`/init_weight_transfer_engine`) and broadcasts weight by
    weight (`/start_weight_update`, `/update_weights`, `/finish_weight_update`), so that a sharded policy is never whole
    on one GPU. vLLM must be installed beside the trainer too, and its servers started with
    `--weight-transfer-config '{"backend": "nccl"}'`. Written against vLLM 0.32 and not run on a GPU.

    Raises:
        ImportError: vLLM is not installed here.
    """

    address: str = "127.0.0.1"
    """Address of the first process, as the servers reach it."""
    port: int = 29600
    """A free port there."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._engine: Any = None
        self._servers: Servers | None = None
        self._source: Weights | None = None

    def send(self, policy: PolicyModel, clients: Sequence[Client], *, label: str, dtype: DType) -> Sent | None:
        """Broadcast every weight.

        Raises:
            ValueError: the policy is an adapter on a sharded or quantized model, which cannot be folded in.
        """
        network = policy.network
        if is_adapted(network):
            if policy.blueprint is not None or is_quantized(network):
                kind = "quantized" if policy.blueprint is None else "sharded"
                raise ValueError(f"NCCL cannot fold an adapter into a {kind} model: take SharedFolder()")
            network = merged(network)
        if self._source is None:
            self._source, self._servers = Weights(), Servers()
        assert self._servers is not None
        self._source.set(network, getattr(torch, dtype))
        self._servers.label, self._servers.clients = label, clients
        if self._engine is None:
            self._engine = self._joined(self._servers, self._source, rank=0 if clients else 1)
        self._engine.send_weights()
        self._source.set(None, torch.float32)
        return self._source.sent() if clients else None

    def close(self) -> None:
        """Leave the group."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = self._source = self._servers = None

    def _joined(self, servers: Servers, source: Weights, *, rank: int) -> Any:
        try:
            from vllm.distributed.weight_transfer import nccl_engine
        except ImportError as error:
            raise ImportError(
                "the engine's NCCL transfer needs vLLM beside the trainer: pip install vllm, or take SharedFolder()"
            ) from error
        info = nccl_engine.NCCLTrainerInitInfo(
            master_address=self.address, master_port=self.port, world_size=1 + servers.workers(), rank=rank
        )
        return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(info, client=servers, source=source)


class Servers:
    """All servers as one, in the words of vLLM's `VLLMWeightSyncClient`.

    Attributes:
        clients: of the servers; none but on the first process.
        label: of the weights on their way.
    """

    def __init__(self) -> None:
        self.clients: Sequence[Client] = []
        self.label = ""

    def workers(self) -> int:
        """Return the number of workers of all servers."""
        return sum(self._sizes())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every worker join the group, those of a server after those of the servers before."""
        offsets = [init_info["rank_offset"]]
        for size in self._sizes():
            offsets.append(offsets[-1] + size)
        bodies = [{"init_info": init_info | {"rank_offset": offset}} for offset in offsets]
        self._post("/init_weight_transfer_engine", bodies[: len(self.clients)])

    def start_weight_update(self) -> None:
        """Announce the weights."""
        self._post("/start_weight_update", [{}] * len(self.clients))

    def update_weights(self, update_info: Any) -> None:
        """Have the workers receive what is broadcast meanwhile."""
        self._post("/update_weights", [{"update_info": update_info}] * len(self.clients))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the weights into use under their label."""
        self._post("/finish_weight_update", [{"weight_version": self.label}] * len(self.clients))
        self._post("/reset_prefix_cache", [{}] * len(self.clients))

    def _sizes(self) -> list[int]:
        return [int(client.get("/get_world_size")["world_size"]) for client in self.clients]

    def _post(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        with ThreadPoolExecutor(max(len(self.clients), 1)) as pool:
            calls = [
                pool.submit(c.post, path, body, repeats=False) for c, body in zip(self.clients, bodies, strict=True)
            ]
            for call in calls:
                call.result()


class Parameter(NamedTuple):
    """A weight as vLLM announces it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """Weights of a network one after the other, in the words of vLLM's `WeightSource`.

    All processes of a sharded network must iterate.
    """

    def __init__(self) -> None:
        self._network: nn.Module | None = None
        self._dtype = torch.float32
        self._size = 0
        self._sums: list[Tensor] = []

    def set(self, network: nn.Module | None, dtype: torch.dtype) -> None:
        """Take up a network, or let go of it."""
        self._network, self._dtype = network, dtype

    def metadata(self) -> list[Parameter]:
        """List what comes, without gathering it."""
        return [Parameter(name, self._dtype, tuple(weight.shape)) for name, weight in self._parameters()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._size, self._sums = 0, []
        for name, weight in self._parameters():
            tensor = whole_tensor(weight).to(self._dtype).contiguous()
            self._size += tensor.nbytes
            self._sums.append(tensor.view(WORDS[tensor.element_size()]).sum(dtype=torch.int64))
            yield name, tensor

    def sent(self) -> Sent:
        """Return size and fingerprint of what was iterated last."""
        return Sent(self._size, hash(tuple(torch.stack(self._sums).tolist())))

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [] if self._network is None else list(self._network.named_parameters())
