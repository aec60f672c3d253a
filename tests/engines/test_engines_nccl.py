"""NCCL transfer, against fakes of vLLM's trainer engine and of its servers' routes: nothing here needs a GPU."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, serving

from lightning_rlhf.engines import NCCL, EngineError, Request, SamplingParams, VLLMServer, sample
from lightning_rlhf.models import PolicyModel

PROMPTS = [[5, 6, 7], [8], [9, 10]]


@dataclass
class InitInfo:
    """As `NCCLTrainerInitInfo` of vLLM 0.32."""

    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    rank: int = 0


class TrainerEngine:
    """As `NCCLTrainerWeightTransferEngine` of vLLM 0.32, but for the broadcast."""

    made: list[TrainerEngine] = []
    servers: list[FakeVLLM] = []
    loses: set[str] = set()

    def __init__(self, info: InitInfo, client: Any, source: Any) -> None:
        self.info, self.client, self.source, self.open = info, client, source, True
        self.made.append(self)

    @classmethod
    def trainer_init(cls, info: InitInfo, *, client: Any, source: Any) -> TrainerEngine:
        engine = cls(info, client, source)
        if info.rank == 0:
            client.init_weight_transfer_engine(asdict(info) | {"rank_offset": 1})
        return engine

    @torch.no_grad()
    def send_weights(self) -> None:
        meta = self.source.metadata()
        tensors = list(self.source)
        assert [(m.name, m.dtype, m.shape) for m in meta] == [(n, t.dtype, tuple(t.shape)) for n, t in tensors]
        if self.info.rank != 0:
            return
        self.client.start_weight_update()
        names = [m.name for m in meta]
        self.client.update_weights({"names": names, "dtype_names": [str(m.dtype)[6:] for m in meta]})
        for server in self.servers:
            state = {name: tensor for name, tensor in tensors if name not in self.loses}
            server.network.load_state_dict(state, strict=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        self.open = False


@pytest.fixture
def vllm(monkeypatch):
    """A package `vllm` with the module that the trainer imports."""
    monkeypatch.setattr(TrainerEngine, "made", [])
    monkeypatch.setattr(TrainerEngine, "servers", [])
    monkeypatch.setattr(TrainerEngine, "loses", set())
    names = ["vllm", "vllm.distributed", "vllm.distributed.weight_transfer"]
    for name in [*names, f"{names[-1]}.nccl_engine"]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules[f"{names[-1]}.nccl_engine"]
    module.NCCLTrainerInitInfo, module.NCCLTrainerWeightTransferEngine = InitInfo, TrainerEngine
    sys.modules[names[-1]].nccl_engine = module
    return TrainerEngine


@pytest.fixture
def policy(make_lm):
    return PolicyModel(make_lm("llama").double().eval())


def greedy(policy, batch) -> Request:
    params = SamplingParams(max_new_tokens=5)
    return Request(prompts=batch, samples=1, uniforms=None, params=params, end_tokens=policy.end_tokens)


def test_weights_reach_every_server_by_the_four_routes(vllm, policy, left_padded):
    with serving(policy.network) as one, serving(policy.network) as two:
        vllm.servers += [one, two]
        one.workers, two.workers = 2, 4
        engine = VLLMServer(urls=[one.url, two.url], sync=NCCL(address="10.0.0.1", port=7000), patience=0.05)
        request = greedy(policy, left_padded(PROMPTS))
        for version in range(3):
            engine.load(policy, version)
            expected = sample(policy, request.prompts, None, request.params).tokens
            assert torch.equal(engine.generate(request).tokens, expected)
            with torch.no_grad():
                for weight in policy.parameters():
                    weight.mul_(1 + 0.2 * torch.randn_like(weight))
        assert len(vllm.made) == 1  # the group is joined once
        info = vllm.made[0].info
        assert (info.master_address, info.master_port, info.world_size, info.rank) == ("10.0.0.1", 7000, 7, 0)
        for server, offset in ((one, 1), (two, 3)):
            paths = [path for path, _ in server.calls if "weight_update" in path or path == "/update_weights"]
            assert paths == ["/start_weight_update", "/update_weights", "/finish_weight_update"] * 3
            (init,) = server.bodies("/init_weight_transfer_engine")
            assert init["init_info"]["rank_offset"] == offset
            assert init["init_info"]["world_size"] == 7
            names = server.bodies("/update_weights")[0]["update_info"]["names"]
            assert names == [name for name, _ in policy.network.named_parameters()]
            assert len(server.bodies("/reset_prefix_cache")) == 3
        bytes_sent = sum(weight.nbytes for weight in policy.parameters())
        assert engine.metrics()["sync/gib"] == pytest.approx(bytes_sent / 2**30)
        engine.close()
        assert not vllm.made[0].open


def test_weight_that_is_lost_on_the_way_is_caught(vllm, policy):
    with serving(policy.network) as fake:
        vllm.servers.append(fake)
        engine = VLLMServer(urls=[fake.url], sync=NCCL(), patience=0.05)
        engine.load(policy, 0)
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(1 + 0.2 * torch.randn_like(weight))
        vllm.loses.add("lm_head.weight")
        with pytest.raises(EngineError, match="does not have the weights that were sent"):
            engine.load(policy, 1)


def test_processes_after_the_first_gather_and_send_nothing(vllm, policy):
    sync = NCCL()
    assert sync.send(policy, [], label="0", dtype="float32") is None
    assert vllm.made[0].info.rank == 1


def test_without_vllm_the_other_way_is_named(policy):
    with (
        serving(policy.network) as fake,
        pytest.raises(ImportError, match=r"pip install vllm, or take SharedFolder\(\)"),
    ):
        VLLMServer(urls=[fake.url], sync=NCCL(), patience=0.05).load(policy, 0)
